"""A user at the URL, with a browser that has no JavaScript."""

from __future__ import annotations

import html
import re
import ssl
from functools import cache
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, HTTPSHandler, build_opener


@cache
def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    """To read all of a system's authorities takes longer than a page."""
    return ssl.create_default_context(cafile=ca_file)


class Visitor:
    """Opens the page, fills in the form, looks at the progress. Keeps cookies."""

    def __init__(self, url: str, *, forwarded_for: str = "", ca_file: Path | None = None) -> None:
        self.url = url
        self.ca_file = ca_file
        self.status = 0
        self.headers: dict[str, str] = {}
        self.cookies = CookieJar()
        #: What the page says is wrong, if it does.
        self.problem = ""
        self._opener = build_opener(HTTPCookieProcessor(self.cookies), HTTPSHandler(context=_trusting(ca_file)))
        if forwarded_for:  # as the reverse proxy says it
            self._opener.addheaders.append(("X-Forwarded-For", forwarded_for))

    def open(self, url: str | None = None, form: dict[str, str] | None = None) -> str:
        """The text of the page; its HTTP status is in ``status``."""
        data = None if form is None else urlencode(form).encode()
        try:
            with self._opener.open(url or self.url, data, timeout=60) as answer:
                self.status, self.headers = answer.status, dict(answer.headers)
                page = str(answer.read().decode())
        except HTTPError as error:
            self.status = error.code
            page = error.read().decode()
        problem = re.search(r'<p class="problem"[^>]*>(.*?)</p>', page, re.DOTALL)
        self.problem = plain(problem[1]) if problem else ""
        return page

    def request(self, email: str, password: str, last_name: str, first_name: str) -> str:
        """Fill in the form as a user does; what the page says then, as plain text."""
        token = re.search(r'name="csrf_token" value="([^"]+)"', self.open())
        form = {
            "csrf_token": token[1] if token else "",
            "email": email,
            "password": password,
            "last_name": last_name,
            "first_name": first_name,
        }
        return plain(self.open(form=form))

    def progress(self) -> str:
        return plain(self.open(self.url + "/progress"))


def plain(page: str) -> str:
    """The words in the page's main part."""
    main = re.search(r"<main>(.*)</main>", page, re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", main[1] if main else page)).split())
