"""Debian's Chromium, driven as a user drives it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from bascule.lab.process import program

WIDE = (1200, 1000)
SMALL = (360, 740)  # CSS pixels of a small telephone


@contextmanager
def browser(language: str = "en", *, size: tuple[int, int] = WIDE, javascript: bool = True) -> Iterator[Chrome]:
    """A browser whose user reads ``language`` (RFC 5646), with a profile of its own, for the ``with`` block.

    It reaches nothing but this machine.
    """
    with tempfile.TemporaryDirectory(prefix="bascule-browser-") as profile:
        options = ChromeOptions()
        options.binary_location = program("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",  # the lab runs as root
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
            f"--user-data-dir={profile}",
            f"--lang={language}",
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        # The path is given, so that Selenium looks for no driver elsewhere.
        driver = Chrome(options=options, service=Service(program("chromedriver")))
        try:
            resize(driver, size)
            if not javascript:
                driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
            yield driver
        finally:
            driver.quit()


def resize(driver: Chrome, size: tuple[int, int]) -> None:
    """Show pages in a window of this width and height; the real window cannot be made as small as a telephone."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
