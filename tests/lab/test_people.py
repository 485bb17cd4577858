"""What users see and are written to, and what administrators do for many: page, messages, pause, import, report."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from random import Random
from typing import Any
from urllib.request import urlopen

import pytest
from imapclient.exceptions import LoginError
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from bascule.lab.browser import SMALL, browser
from bascule.lab.ghost import slow_line
from bascule.lab.mail import Ledger, fill_mailbox, message
from bascule.lab.process import program
from bascule.lab.sites import DOMAIN, Lab, NewSite, eventually, full
from bascule.lab.visitor import Visitor

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


@pytest.fixture
def written_to(new: NewSite) -> object:
    """The domain writes to its users, as it does by default."""
    change = "UPDATE bascule.domain SET writes_to_users = %s WHERE name = %s"
    new.sql(change, True, DOMAIN, role="postgres")
    yield
    new.sql(change, False, DOMAIN, role="postgres")


def messages(site: Any, name: str, password: str, kind: str) -> list[EmailMessage]:
    """The messages of one kind in an INBOX."""
    with site.client(name, password) as client:
        client.select_folder("INBOX", readonly=True)
        uids = client.search(["HEADER", "Message-ID", f"<bascule-{kind}"])
        found = client.fetch(uids, ["BODY.PEEK[]"])
    return [message_from_bytes(found[uid][b"BODY[]"], policy=default) for uid in uids]


@pytest.mark.usefixtures("written_to")
def test_a_user_moves_by_the_page_in_arabic(lab: Lab, ledger: Ledger, random: Random, await_state: Await) -> None:
    """On a telephone, in Chromium: from the form to the last words, and what is then in both mailboxes."""
    name, password = "paged", lab.legacy.users["paged"]
    fill_mailbox(lab.legacy, name, ledger, random, messages=200)
    with browser("ar", size=SMALL) as chrome:
        chrome.get(lab.url)
        for field, written in (
            ("email", full(name)),
            ("password", "wrong"),
            ("last_name", "بكر"),
            ("first_name", "أمينة"),
        ):
            chrome.find_element(By.NAME, field).send_keys(written)
        chrome.find_element(By.CSS_SELECTOR, "button").click()
        alert = WebDriverWait(chrome, 30).until(lambda _: chrome.find_elements(By.CSS_SELECTOR, "[role=alert]"))[0]
        assert alert.text == "خادم البريد القديم لا يعرف هذا العنوان مع كلمة المرور هذه. لم يتغير أي شيء."
        assert lab.new.state(name) is None
        chrome.find_element(By.NAME, "password").send_keys(password)
        chrome.find_element(By.CSS_SELECTOR, "button").click()
        WebDriverWait(chrome, 30).until(lambda _: chrome.current_url.endswith("/progress"))
        chrome.execute_script("window.still = true")
        words = WebDriverWait(chrome, 90).until(
            lambda _: "تم نقل صندوق بريدك" in chrome.find_element(By.TAG_NAME, "main").text
        )
        assert words
        assert chrome.execute_script("return window.still")  # without loading the page anew
        assert "new.lab.test" in chrome.find_element(By.CSS_SELECTOR, ".servers").text
    await_state(name)
    asked = lab.new.sql("SELECT first_name, last_name, language FROM bascule.mailboxes WHERE address = %s", full(name))
    assert asked == [("أمينة", "بكر", "ar")]
    welcomed = eventually("the welcome is here", lambda: messages(lab.new, name, password, "welcome"))
    assert [each["Subject"] for each in welcomed] == ["أهلا بك في صندوق بريدك على الخادم الجديد"]
    assert "new.lab.test" in welcomed[0].get_content()
    assert welcomed[0]["Auto-Submitted"] == "auto-generated"
    last = messages(lab.legacy, name, password, "last")
    assert [each["Subject"] for each in last] == ["تم نقل صندوق بريدك"]
    swept = lab.new.sql("SELECT swept_at FROM bascule.mailboxes WHERE address = %s", full(name))
    again = "SELECT 1 FROM bascule.mailboxes WHERE address = %s AND swept_at > %s"
    eventually("it was swept again", lambda: lab.new.sql(again, full(name), swept[0][0]))
    assert len(messages(lab.new, name, password, "welcome")) == 1
    assert len(messages(lab.legacy, name, password, "last")) == 1


@pytest.mark.usefixtures("written_to")
def test_a_user_is_asked_for_the_new_password(lab: Lab, await_state: Await) -> None:
    """It was changed at the legacy server while the move waited; the message comes once, where the user reads mail."""
    name = "troubled"
    old = lab.legacy.users[name]
    lab.new.cli("pause", DOMAIN, "--reason", "so that it waits")
    try:
        Visitor(lab.url).request(full(name), old, "Ble", "Trou")
        assert lab.new.state(name) == "requested"
        lab.legacy.set_users({**lab.legacy.users, name: "a new one"}, lab.legacy.aliases)
    finally:
        assert lab.new.cli("resume", DOMAIN).returncode == 0

    def written() -> list[EmailMessage]:
        try:
            return messages(lab.legacy, name, "a new one", "1")
        except LoginError:
            return []  # Dovecot has not read the file with the passwords anew

    told = eventually("the user is written to", written, 90)
    assert [each["Subject"] for each in told] == ["Your mailbox is moving, and needs your password"]
    assert lab.url in told[0].get_content()
    visitor = Visitor(lab.url)
    visitor.request(full(name), "a new one", "Ble", "Trou")
    assert visitor.status == 200
    await_state(name)
    assert len(messages(lab.legacy, name, "a new one", "1")) == 1


def test_a_copy_that_is_paused_stops_and_goes_on(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "paused"
    with lab.legacy.client(name) as client:
        for number in range(120):
            body = message(ledger.give(f"{number}@{name}.test", name), full(name), random, size=400_000)
            client.append("INBOX", body)
    how_far = "SELECT messages_copied FROM bascule.mailboxes WHERE address = %s"

    def copied() -> int:
        return int(lab.new.sql(how_far, full(name))[0][0])

    with slow_line(lab.new, 40_000_000):
        request_move(name)
        eventually("some are copied", lambda: copied() > 3, 60)
        assert lab.new.cli("pause", full(name), "--reason", "she gives a lecture").returncode == 0
        eventually("the copy stops", lambda: "event=paused" in lab.new.worker.tail(5))
        stopped_at = copied()
        assert 0 < stopped_at < 120
        time.sleep(5)  # longer than it takes to look after mailboxes that nobody attends to
        assert copied() == stopped_at
        assert "paused: she gives a lecture" in lab.new.cli("status", DOMAIN).stdout
    assert lab.new.cli("resume", full(name)).returncode == 0
    await_state(name)


def test_many_users_are_imported(lab: Lab, tmp_path: Path, await_state: Await) -> None:
    one, two, three = (f"imported-{number}" for number in (1, 2, 3))
    file = tmp_path / "users.csv"

    def run(*rows: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        file.write_text("\n".join(["address,password,last_name,first_name", *rows]))
        done = lab.new.cli("import", DOMAIN, str(file), *options)
        assert "secret" not in done.stdout
        return done.returncode, done.stdout

    status, text = run(f"{full(one)},{lab.legacy.users[one]},One,User", f"{full(one)},secret,,", "nonsense,secret,,")
    assert status == 1
    assert "nothing was changed, for the file has mistakes:" in text
    assert f"line 3: {full(one)} was there before" in text
    assert "line 4: the address is none" in text
    assert lab.new.state(one) is None

    rows = (
        f"{full(one)},{lab.legacy.users[one]},One,User",
        f"{full(two)},secret guess,Two,User",
        f"{full(three)},,Three,User",
        f"{full('nobody-imported')},secret guess,,",
    )
    status, text = run(*rows, options=("--dry-run",))
    assert (status, lab.new.state(one), lab.new.state(three)) == (1, None, None)
    status, text = run(*rows)
    assert status == 1
    assert f"{full(two)}: localhost:{lab.legacy.ports.imaps} refuses the login of {full(two)}" in text
    for words in ("1 requested", "2 refused", "1 expected"):
        assert words in text
    assert lab.new.state(two) is None
    assert lab.new.state(three) == "legacy"
    status, text = run(f"{full(one)},{lab.legacy.users[one]},One,User", f"{full(two)},{lab.legacy.users[two]},Two,U")
    assert status == 0
    assert "1 on the move already" in text
    assert "1 requested" in text
    for name in (one, two):
        await_state(name)
    logged = "".join(daemon.log.read_text(errors="replace") for daemon in lab.new.daemons)
    assert "secret guess" not in logged
    lab.new.cli("waive", full(three), "--reason", "of this test only")


def test_the_page_while_the_database_is_away(lab: Lab) -> None:
    visitor = Visitor(lab.url)
    lab.new.postgres.kill()
    try:
        assert "This does not work now. Nothing was changed" in visitor.open()
        assert visitor.status == 503
    finally:
        lab.new.postgres.start()
    eventually("the page is there again", lambda: "Move your mailbox" in visitor.open() and visitor.status == 200)


def test_the_report_names_every_folder(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await, tmp_path: Path
) -> None:
    name = "awaited"
    fill_mailbox(lab.legacy, name, ledger, random, messages=30)
    request_move(name)
    await_state(name)
    told = json.loads(lab.new.cli("report", DOMAIN, "--json").stdout)
    mine = next(each for each in told["moved"] if each["address"] == full(name))
    assert {folder["name"] for folder in mine["folder_list"]} >= {"INBOX", "Projets/Été & Co"}
    assert mine["messages"] == len(ledger.expected)
    assert f"{full(name)}: {mine['messages']} messages in" in lab.new.cli("report", DOMAIN).stdout
    page = tmp_path / "report.html"
    assert lab.new.cli("report", DOMAIN, "--html", str(page)).returncode == 0
    with browser("en") as chrome:
        chrome.get(page.as_uri())
        assert chrome.find_element(By.TAG_NAME, "h1").text == f"Verification of the mailboxes of {DOMAIN}"
        row = next(each for each in chrome.find_elements(By.CSS_SELECTOR, "tbody > tr") if full(name) in each.text)
        row.find_element(By.TAG_NAME, "summary").click()
        assert "Projets/Été & Co" in row.text


def test_status_is_watched(lab: Lab) -> None:
    """On a terminal, with progress bars, until Ctrl-C."""
    command = [*lab.new.worker.command]
    bascule = command[0].replace("bascule-worker", "bascule")
    words = f"timeout -s INT 6 {bascule} --settings {lab.new.settings_file} status {DOMAIN} --watch"
    done = subprocess.run(
        ["script", "-qec", words, "/dev/null"], capture_output=True, text=True, timeout=60, check=False
    )
    assert DOMAIN in done.stdout
    assert "migrated" in done.stdout
    assert "━" in done.stdout
    assert "Traceback" not in done.stdout


#: What is written in monitoring/, whatever part exports it.
NAMED = re.compile(r"\bbascule_[a-z_]+\b")
SUFFIXES = re.compile(r"_(total|bucket|sum|count|created)$")


def test_what_the_dashboard_and_the_alerts_name_is_exported(lab: Lab) -> None:
    settings = lab.new.settings
    exported: set[str] = set()
    for part in (settings.policy_daemon, settings.authenticator, settings.milter, settings.worker, settings.portal):
        with urlopen(f"http://{part.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        checked = subprocess.run(
            [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert "error while linting" not in checked.stderr
        exported |= set(re.findall(r"^# TYPE (bascule_\w+)", text, re.MULTILINE))
    folder = Path(__file__).parents[2] / "monitoring"
    named = {
        name for file in ("alerts.yml", "grafana-dashboard.json") for name in NAMED.findall((folder / file).read_text())
    }
    assert {SUFFIXES.sub("", name) for name in named} <= {SUFFIXES.sub("", name) for name in exported}
    with urlopen(f"http://{settings.worker.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    moved = re.search(r'^bascule_mailboxes\{domain="lab\.test",state="local"\} (\S+)', text, re.MULTILINE)
    assert moved is not None
    assert float(moved[1]) == lab.new.sql("SELECT migrated FROM bascule.domains WHERE domain = %s", DOMAIN)[0][0]
