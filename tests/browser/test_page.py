"""The users' page in Chromium: three languages, every stage, telephone, keyboard, screen reader, without JavaScript.

``BASCULE_SCREENSHOTS=folder`` keeps a picture of every stage, to be looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest
from axe_core_python.base import AXE_FILE_PATH
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from bascule.database import Connection
from bascule.lab.browser import SMALL, WIDE, resize
from bascule.language import LANGUAGES, RIGHT_TO_LEFT, Language

Look = Callable[[Chrome, int], None]
Visit = Callable[..., AbstractContextManager[Chrome]]
Put = Callable[..., int]

NARROWEST = (320, 600)  # WCAG 2.1, 1.4.10: no scrolling in two directions

AXE = AXE_FILE_PATH.read_text()

#: A mailbox at every stage, and the heading of the stage.
STAGES: dict[str, tuple[str, dict[str, object], dict[Language, str]]] = {
    "waiting": (
        "requested",
        {},
        {"en": "Your request is accepted", "fr": "Votre demande est acceptée", "ar": "قُبل طلبك"},
    ),
    "paused": (
        "requested",
        {"paused_at": "now", "pause_reason": "fair"},
        {
            "en": "Your request is accepted, and waits",
            "fr": "Votre demande est acceptée, et attend",
            "ar": "قُبل طلبك وهو في الانتظار",
        },
    ),
    "copying": (
        "copying",
        {"messages_total": 12345, "messages_copied": 4321},
        {"en": "Your messages are being copied", "fr": "Vos messages sont en cours de copie", "ar": "يجري نسخ رسائلك"},
    ),
    "finishing": (
        "cutover",
        {"cutover_deadline": "tomorrow"},
        {"en": "Nearly done", "fr": "C'est presque fini", "ar": "أوشك على الانتهاء"},
    ),
    "done": (
        "local",
        {},
        {"en": "Your mailbox has moved", "fr": "Votre boîte aux lettres a déménagé", "ar": "تم نقل صندوق بريدك"},
    ),
    "password": (
        "copying",
        {"needs_credential": True},
        {
            "en": "Please give your password again",
            "fr": "Merci de redonner votre mot de passe",
            "ar": "من فضلك أدخل كلمة مرورك مرة أخرى",
        },
    ),
    "leaving": (
        "returning",
        {"cutover_deadline": "tomorrow"},
        {
            "en": "Your mailbox is being moved back to the old server",
            "fr": "Votre boîte aux lettres retourne sur l'ancien serveur",
            "ar": "تجري إعادة صندوق بريدك إلى الخادم القديم",
        },
    ),
    "stopped": (
        "legacy",
        {},
        {
            "en": "Your mailbox is at the old server",
            "fr": "Votre boîte aux lettres est sur l'ancien serveur",
            "ar": "صندوق بريدك في الخادم القديم",
        },
    ),
}


def keep(chrome: Chrome, name: str) -> None:
    if folder := os.environ.get("BASCULE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        chrome.save_screenshot(f"{folder}/{name}.png")


def text(chrome: Chrome, selector: str) -> str:
    return chrome.find_element(By.CSS_SELECTOR, selector).text


def await_text(chrome: Chrome, selector: str, words: str, seconds: float = 20) -> None:
    """A page may be on its way."""
    wait = WebDriverWait(chrome, seconds, ignored_exceptions=(NoSuchElementException, StaleElementReferenceException))
    wait.until(lambda _: words in text(chrome, selector))


def insist_on_accessibility(chrome: Chrome) -> None:
    """What axe-core can tell of WCAG 2.1 AA, and that nothing stands out of the window."""
    chrome.execute_script(AXE)
    found = chrome.execute_async_script(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']}).then(arguments[0])"
    )
    wrong = [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]]
    assert wrong == []
    assert chrome.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def complaints(chrome: Chrome) -> object:
    """What the browser wrote into its console: what the policy forbids, what is not there."""
    return chrome.get_log("browser")  # type: ignore[no-untyped-call]


def insist_on_language(chrome: Chrome, language: Language) -> None:
    page = chrome.find_element(By.TAG_NAME, "html")
    assert page.get_attribute("lang") == language
    assert page.get_attribute("dir") == ("rtl" if language in RIGHT_TO_LEFT else "ltr")


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_form(visit: Visit, language: Language) -> None:
    headings = {"en": "Move your mailbox", "fr": "Déménagez votre boîte aux lettres", "ar": "انقل صندوق بريدك"}
    with visit(language) as chrome:
        insist_on_language(chrome, language)
        assert text(chrome, "h1") == headings[language]
        assert "Port of Example" in text(chrome, "header")
        assert "Help desk, telephone 4711" in text(chrome, "footer")
        for size in (WIDE, SMALL, NARROWEST):
            resize(chrome, size)
            for scheme in ("light", "dark"):
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                insist_on_accessibility(chrome)
                keep(chrome, f"form-{language}-{size[0]}-{scheme}")
        assert complaints(chrome) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_stage(visit: Visit, look: Look, put: Put, language: Language) -> None:
    with visit(language, size=SMALL) as chrome:
        for stage, (state, columns, headings) in STAGES.items():
            look(chrome, put(state, **columns))
            insist_on_language(chrome, language)
            assert text(chrome, "[role=status] h2") == headings[language]
            assert "amina.bakr@example.org" in text(chrome, "main")
            insist_on_accessibility(chrome)
            keep(chrome, f"{stage}-{language}")
        assert complaints(chrome) == []


def test_progress_tells_how_many_and_how_long(visit: Visit, put: Put, owner: Connection) -> None:
    mailbox = put("copying", messages_total=9000, messages_copied=3000)
    owner.execute("UPDATE mailbox SET copy_began_at = now() - interval '10 minutes', copied_before = 0")
    with visit("en", mailbox) as chrome:
        assert "3,000 of 9,000 messages" in text(chrome, "main")
        assert "About 20 minutes left" in text(chrome, "main")
        assert chrome.find_element(By.TAG_NAME, "progress").get_attribute("value") == "3000"
        chrome.find_element(By.LINK_TEXT, "Français").click()
        assert "Encore 20 minutes environ" in text(chrome, "main")
        chrome.find_element(By.LINK_TEXT, "العربية").click()
        assert "20 دقيقة" in text(chrome, "main")


def test_who_waits_is_told_how_many_are_before(visit: Visit, put: Put, owner: Connection) -> None:
    mailbox = put("requested")
    owner.execute(
        "INSERT INTO mailbox (domain_id, local_part, full_address, store, state, sealed_credential, state_since) "
        "SELECT id, 'other' || n, 'other' || n || '@example.org', 'local', 'requested', 's', now() - interval '1 hour' "
        "FROM domain, generate_series(1, 3) AS n"
    )
    with visit("ar", mailbox) as chrome:
        assert "3 صناديق قبل صندوقك." in text(chrome, "main")
        chrome.find_element(By.LINK_TEXT, "English").click()
        assert "3 mailboxes are served before yours." in text(chrome, "main")


def test_done_says_how_to_set_up_the_mail_program(visit: Visit, put: Put) -> None:
    with visit("en", put("local")) as chrome:
        words = " ".join(text(chrome, ".servers").split())
        assert words == (
            "Incoming mail (IMAP) Server: imap.new.example.org Port: 993 Security: SSL/TLS "
            "Outgoing mail (SMTP) Server: smtp.new.example.org Port: 587 Security: STARTTLS"
        )
        assert "User name: amina.bakr@example.org" in text(chrome, "main")


def test_progress_is_shown_without_loading_the_page_anew(visit: Visit, put: Put, owner: Connection) -> None:
    mailbox = put("copying", messages_total=100, messages_copied=10)
    with visit("en", mailbox) as chrome:
        chrome.execute_script("window.still = true; document.querySelector('[role=status]').still = true")
        owner.execute("UPDATE mailbox SET messages_copied = 60")
        await_text(chrome, "main", "60 of 100")
        # What a screen reader has read is the same element, so it is not read again.
        assert chrome.execute_script("return document.querySelector('[role=status]').still")
        owner.execute("UPDATE mailbox SET state = 'local' WHERE id = %s", (mailbox,))
        await_text(chrome, "[role=status] h2", "Your mailbox has moved")
        assert chrome.execute_script(
            "return window.still && document.getElementById('progress').hasAttribute('data-final')"
        )


def test_progress_is_shown_without_javascript(visit: Visit, put: Put, owner: Connection) -> None:
    mailbox = put("copying", messages_total=100, messages_copied=10)
    with visit("fr", mailbox, javascript=False) as chrome:
        assert "10 messages sur 100" in text(chrome, "main")
        owner.execute("UPDATE mailbox SET state = 'local' WHERE id = %s", (mailbox,))
        await_text(chrome, "[role=status] h2", "Votre boîte aux lettres a déménagé", 30)


@pytest.mark.parametrize("javascript", [True, False])
def test_the_form_by_keyboard_alone(visit: Visit, owner: Connection, javascript: bool) -> None:
    """The legacy server is away here: nothing is changed, and what was written is still there, but the password."""
    owner.execute("DELETE FROM mailbox")
    with visit("en", javascript=javascript) as chrome:

        def press(*keys: str) -> None:
            ActionChains(chrome).send_keys(*keys).perform()

        def focused() -> str | None:
            return chrome.switch_to.active_element.get_attribute("name")

        for _ in LANGUAGES:
            press(Keys.TAB)
        for name, written in (
            ("email", "amina.bakr@elsewhere.org"),
            ("password", "tide table"),
            ("last_name", "Bakr"),
            ("first_name", "Amina"),
        ):
            press(Keys.TAB)
            assert focused() == name
            press(written)
        press(Keys.ENTER)
        await_text(chrome, "[role=alert]", "This page is for addresses that end in @example.org.")
        assert chrome.title.startswith("Not accepted")
        email = chrome.find_element(By.NAME, "email")
        assert focused() == "email"
        assert email.get_attribute("aria-invalid") == "true"
        assert "problem" in str(email.get_attribute("aria-describedby"))
        assert chrome.find_element(By.NAME, "password").get_attribute("value") == ""
        assert chrome.find_element(By.NAME, "first_name").get_attribute("value") == "Amina"
        ActionChains(chrome).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        press("amina.bakr@example.org", Keys.TAB, "tide table", Keys.ENTER)
        await_text(chrome, "[role=alert]", "The old mail server does not answer now.")
    assert owner.execute("SELECT FROM mailbox").fetchall() == []


def test_what_a_browser_checks_itself(visit: Visit) -> None:
    """Nothing is sent before all four fields are filled in."""
    with visit("en") as chrome:
        chrome.find_element(By.CSS_SELECTOR, "button").click()
        assert chrome.execute_script("return document.querySelectorAll(':user-invalid').length") == 4
        assert chrome.find_elements(By.CSS_SELECTOR, "[role=alert]") == []


@pytest.mark.parametrize(
    ("language", "words"),
    [("en", "This link is not known"), ("fr", "Ce lien est inconnu"), ("ar", "هذا الرابط غير معروف")],
)
def test_a_link_that_is_not_whole(visit: Visit, language: Language, words: str) -> None:
    with visit(language) as chrome:
        chrome.get(chrome.current_url[:-3])
        insist_on_language(chrome, language)
        assert text(chrome, "h1") == words
        insist_on_accessibility(chrome)


def test_an_estimate_is_never_less_than_a_minute(visit: Visit, put: Put, owner: Connection) -> None:
    mailbox = put("copying", messages_total=9000, messages_copied=8999)
    owner.execute("UPDATE mailbox SET copy_began_at = now() - %s, copied_before = 0", (timedelta(minutes=1),))
    with visit("en", mailbox) as chrome:
        assert "About 1 minute left" in text(chrome, "main")
