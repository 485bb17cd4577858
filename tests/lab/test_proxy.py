"""The users' page behind a real nginx with TLS, as config_templates has it."""

from __future__ import annotations

import re
import ssl
import subprocess
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, HTTPSHandler, build_opener

import pytest

from bascule.config_templates import render
from bascule.lab.process import Daemon, free_ports, program
from bascule.lab.sites import Lab, eventually, full

pytestmark = pytest.mark.lab


class Client:
    """A browser at the proxy."""

    def __init__(self, ca: Path) -> None:
        self.cookies = CookieJar()
        context = ssl.create_default_context(cafile=str(ca))
        self._opener = build_opener(HTTPCookieProcessor(self.cookies), HTTPSHandler(context=context))
        # What a guesser writes to look like another each time.
        self._opener.addheaders.append(("X-Forwarded-For", "192.0.2.77"))
        self.headers: dict[str, str] = {}

    def open(self, url: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        try:
            with self._opener.open(url, None if form is None else urlencode(form).encode(), timeout=60) as answer:
                self.headers = dict(answer.headers)
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def request(self, url: str, **form: str) -> tuple[int, str]:
        token = re.search(r'name="csrf_token" value="([^"]+)"', self.open(url)[1])
        return self.open(url, form | {"csrf_token": token[1] if token else ""})


@pytest.fixture
def proxied(lab: Lab, tmp_path: Path) -> Iterator[str]:
    """The users' URL at nginx; the page is told that it is there."""
    port, behind = free_ports(2)
    new = lab.new
    portal = new.settings.portal.model_copy(
        update={"listen": f"127.0.0.1:{behind}", "public_url": f"https://localhost:{port}", "metrics": None}
    )
    # One source is many people to the lab, but not here.
    settings = new.settings.model_copy(update={"portal": portal, "trusted_sources": ()})
    settings_file = tmp_path / "bascule.toml"
    settings_file.write_text(render("bascule.toml.j2", **settings.model_dump()))
    page = Daemon([*new.portal.command[:-1], str(settings_file)], folder=tmp_path, name="page")
    variables = {
        "listen": f"127.0.0.1:{port}",
        "server_name": "localhost",
        "certificate": new.certificate.chain,
        "private_key": new.certificate.key,
        "access_log": tmp_path / "access.log",
    }
    (tmp_path / "page.conf").write_text(render("nginx/page.conf.j2", nginx=variables, **settings.model_dump()))
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off;\nuser root;\npid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\n"
        f"events {{}}\nhttp {{\n{temporary}include {tmp_path}/page.conf;\n}}\n"
    )
    page.start()
    nginx = subprocess.Popen([program("nginx"), "-c", str(configuration), "-e", f"{tmp_path}/error.log"])
    try:
        eventually("nginx runs", (tmp_path / "nginx.pid").exists, 10)
        yield f"https://localhost:{port}/m/{lab.url.rpartition('/')[2]}"
    finally:
        nginx.terminate()
        nginx.wait(20)
        page.stop()


def test_the_page_behind_nginx(lab: Lab, proxied: str, tmp_path: Path) -> None:
    client = Client(lab.new.certificate.ca)
    status, text = client.open(proxied)
    assert (status, "Move your mailbox" in text) == (200, True)
    assert client.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "default-src 'none'" in client.headers["Content-Security-Policy"]
    filled = {"email": full("behind-proxy"), "last_name": "Quay", "first_name": "Alice"}
    status, text = client.request(proxied, **filled, password="a guess")
    assert (status, "does not know this e-mail address" in text) == (422, True)
    status, text = client.request(proxied, **filled, password=lab.legacy.users["behind-proxy"])
    assert (status, full("behind-proxy") in text) == (200, True)  # after a redirect to the progress, through nginx
    assert lab.new.state("behind-proxy") is not None
    cookie = next(each for each in client.cookies if each.name == "bascule")
    assert cookie.secure
    assert cookie.has_nonstandard_attr("HttpOnly")
    # Neither the link nor what was filled in is in a log.
    logged = (tmp_path / "access.log").read_text() + (tmp_path / "page.log").read_text()
    assert "POST 422" in logged
    for secret in (proxied.rpartition("/")[2], "a guess", lab.legacy.users["behind-proxy"]):
        assert secret not in logged


def test_who_guesses_cannot_look_like_another(lab: Lab, proxied: str, tmp_path: Path) -> None:
    """The limit counts who speaks to nginx, whatever the request says of itself."""
    client = Client(lab.new.certificate.ca)
    answers = [
        client.request(
            proxied, email=full("guessed-behind-proxy"), password=f"guess {number}", last_name="X", first_name="Y"
        )[0]
        for number in range(21)
    ]
    assert answers == [422] * 20 + [429]
    assert "source=127.0.0.1" in (tmp_path / "page.log").read_text()
