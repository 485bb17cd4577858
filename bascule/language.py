"""The languages in which users are written to and spoken with."""

from __future__ import annotations

from typing import Literal, get_args

#: As RFC 5646 names them; the same as the type ``user_language`` of the schema.
Language = Literal["en", "fr", "ar"]

LANGUAGES: tuple[Language, ...] = get_args(Language)
#: What each is called in itself.
NAMES: dict[Language, str] = {"en": "English", "fr": "Français", "ar": "العربية"}
RIGHT_TO_LEFT: frozenset[Language] = frozenset({"ar"})
