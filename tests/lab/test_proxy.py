"""The users' page behind a real nginx with TLS, as config_templates has it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bascule.config_templates import render
from bascule.lab.process import free_ports, program
from bascule.lab.sites import Lab, eventually, full
from bascule.lab.visitor import Visitor
from tests.lab.conftest import another_page

pytestmark = pytest.mark.lab


@pytest.fixture
def proxied(lab: Lab, tmp_path: Path) -> Iterator[str]:
    """The users' URL at nginx; the page is told that it is there."""
    (port,) = free_ports(1)
    certificate = lab.new.certificate
    variables = {
        "listen": [f"127.0.0.1:{port}"],
        "server_name": "localhost",
        "certificate": certificate.chain,
        "private_key": certificate.key,
        "access_log": tmp_path / "access.log",
        "error_log": tmp_path / "error.log",
    }
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off;\nuser root;\npid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\n"
        f"events {{}}\nhttp {{\n{temporary}include {tmp_path}/page.conf;\n}}\n"
    )
    with another_page(lab.new, tmp_path, f"https://localhost:{port}") as settings:
        (tmp_path / "page.conf").write_text(render("nginx/page.conf.j2", nginx=variables, **settings.model_dump()))
        nginx = subprocess.Popen([program("nginx"), "-c", str(configuration), "-e", f"{tmp_path}/error.log"])
        try:
            eventually("nginx runs", (tmp_path / "nginx.pid").exists, 10)
            yield f"https://localhost:{port}/m/{lab.url.rpartition('/')[2]}"
        finally:
            nginx.terminate()
            nginx.wait(20)


@pytest.fixture
def visitor(lab: Lab, proxied: str) -> Visitor:
    """Who writes into each request, as a guesser does, that it comes from elsewhere."""
    return Visitor(proxied, forwarded_for="192.0.2.77", ca_file=lab.new.certificate.ca)


def test_the_page_behind_nginx(lab: Lab, proxied: str, visitor: Visitor, tmp_path: Path) -> None:
    text = visitor.open()
    assert (visitor.status, "Move your mailbox" in text) == (200, True)
    assert visitor.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert "default-src 'none'" in visitor.headers["Content-Security-Policy"]
    name, password = full("behind-proxy"), lab.legacy.users["behind-proxy"]
    text = visitor.request(name, "a guess", "Quay", "Alice")
    assert (visitor.status, "does not know this e-mail address" in text) == (422, True)
    text = visitor.request(name, password, "Quay", "Alice")
    assert (visitor.status, name in text) == (200, True)  # after a redirect to the progress, through nginx
    assert lab.new.state("behind-proxy") is not None
    cookie = next(each for each in visitor.cookies if each.name == "__Host-bascule")
    assert cookie.secure
    assert (cookie.path, cookie.domain_specified) == ("/", False)
    assert cookie.has_nonstandard_attr("HttpOnly")
    # Neither the link nor what was filled in is in a log.
    logged = (tmp_path / "access.log").read_text() + (tmp_path / "page.log").read_text()
    assert "POST 422" in logged
    for secret in (proxied.rpartition("/")[2], "a guess", password):
        assert secret not in logged


def test_who_guesses_cannot_look_like_another(visitor: Visitor, tmp_path: Path) -> None:
    """The limit counts who speaks to nginx, whatever the request says of itself."""
    answers = []
    for number in range(21):
        visitor.request(full("guessed-behind-proxy"), f"guess {number}", "X", "Y")
        answers.append(visitor.status)
    assert answers == [422] * 20 + [429]
    assert "source=127.0.0.1" in (tmp_path / "page.log").read_text()


def test_forms_are_limited_and_what_is_looked_at_is_not(proxied: str, visitor: Visitor, tmp_path: Path) -> None:
    """An office behind one address; who sends too much is told so in words, and no log has the link."""
    assert {_status(visitor) for _ in range(120)} == {200}
    with ThreadPoolExecutor(16) as senders:
        sent = list(senders.map(lambda _: _sends_a_form(visitor, proxied), range(160)))
    limited = [text for status, text in sent if status == 429]
    assert limited
    assert all("Many requests came from your network" in text for text in limited)
    assert {status for status, _ in sent} == {400, 429}  # the others are forms without what the page put into them
    assert _status(visitor) == 200
    logged = (tmp_path / "access.log").read_text() + (tmp_path / "error.log").read_text()
    assert " 429 " in logged
    assert proxied.rpartition("/")[2] not in logged


def test_while_the_page_is_away_nginx_says_so(lab: Lab, proxied: str, tmp_path: Path) -> None:
    """In words, and without the link in its error log."""
    settings = (tmp_path / "page.conf").read_text()
    behind = re.search(r"proxy_pass http://([0-9.:]+);", settings)
    assert behind is not None
    away = settings.replace(behind[1], f"127.0.0.1:{free_ports(1)[0]}")
    (tmp_path / "page.conf").write_text(away)
    os.kill(int((tmp_path / "nginx.pid").read_text()), signal.SIGHUP)
    visitor = Visitor(proxied, ca_file=lab.new.certificate.ca)

    def is_away() -> bool:
        return "please try again in a minute" in visitor.open() and visitor.status == 503

    # The process that has the former configuration may answer once more.
    eventually("nginx says that the page is away", is_away, 20)
    assert proxied.rpartition("/")[2] not in (tmp_path / "error.log").read_text()


def _status(visitor: Visitor) -> int:
    visitor.open()
    return visitor.status


def _sends_a_form(visitor: Visitor, url: str) -> tuple[int, str]:
    other = Visitor(url, ca_file=visitor.ca_file)
    text = other.open(form={"email": "x"})
    return other.status, text
