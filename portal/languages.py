"""In which language a page is shown, and the catalogues of its texts (gettext).

The source language is English. ``locale/<language>.po`` is read at the start
and compiled in memory, so that there is nothing to build. After a change of
text, bring the catalogues up to date with ``portal/locale/update.sh``.
"""

from __future__ import annotations

from datetime import timedelta
from gettext import GNUTranslations, NullTranslations
from io import BytesIO
from pathlib import Path

from babel.dates import format_timedelta
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.numbers import format_decimal
from flask import Flask, g, request, session

from bascule.language import LANGUAGES, NAMES, RIGHT_TO_LEFT, Language

LOCALE = Path(__file__).resolve().parent / "locale"
#: What the user chooses by hand, in the query of any page.
CHOICE = "language"


def _catalogue(language: Language) -> NullTranslations:
    path = LOCALE / f"{language}.po"
    if language == "en":
        return NullTranslations()
    compiled = BytesIO()
    with path.open("rb") as file:
        write_mo(compiled, read_po(file, locale=language))
    compiled.seek(0)
    return GNUTranslations(compiled)


def _chosen() -> Language:
    """By hand, now or before in this session; else by the browser's settings."""
    for wish in (request.args.get(CHOICE), session.get(CHOICE), request.accept_languages.best_match(LANGUAGES)):
        for language in LANGUAGES:
            if wish == language:
                return language
    return "en"


def current() -> Language:
    """The language of the page that is being answered."""
    chosen: Language = g.language
    return chosen


def number(value: int) -> str:
    return str(format_decimal(value, locale=current()))


def about(duration: timedelta) -> str:
    """A duration in words, no finer than minutes: "3 minutes"."""
    return str(format_timedelta(max(duration, timedelta(minutes=1)), granularity="minute", locale=current()))


def install(application: Flask) -> None:
    """Have every page of ``application`` chosen and translated."""
    catalogues = {language: _catalogue(language) for language in LANGUAGES}

    @application.before_request
    def choose() -> None:
        g.language = _chosen()
        if request.args.get(CHOICE) == g.language:
            session[CHOICE] = g.language

    def gettext(text: str) -> str:
        return catalogues[current()].gettext(text)

    def ngettext(one: str, many: str, count: int) -> str:
        return catalogues[current()].ngettext(one, many, count)

    @application.context_processor
    def texts() -> dict[str, object]:
        language = current()
        return {
            "language": language,
            "direction": "rtl" if language in RIGHT_TO_LEFT else "ltr",
            "languages": NAMES,
        }

    application.jinja_env.add_extension("jinja2.ext.i18n")
    application.jinja_env.policies["ext.i18n.trimmed"] = True
    application.jinja_env.install_gettext_callables(gettext, ngettext, newstyle=True)  # type: ignore[attr-defined]
    application.jinja_env.filters.update(number=number, about=about)
