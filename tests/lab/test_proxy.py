"""The users' page behind a real nginx with TLS, as config_templates has it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bascule.config_templates import render
from bascule.lab.process import Daemon, free_ports, program
from bascule.lab.sites import Lab, eventually, full
from bascule.lab.visitor import Visitor

pytestmark = pytest.mark.lab


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
    cookie = next(each for each in visitor.cookies if each.name == "bascule")
    assert cookie.secure
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
