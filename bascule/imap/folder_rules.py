"""Which folders of a legacy mailbox come along, under which name, with which special use: the rules of its domain.

One rule decides a folder: the one for its name, else the longest pattern that
fits, else the one for a special use that the server gives it, else the one for
what Exchange lists and is no mail, else what is built in for a kind of server.
INBOX always comes as it is. What no rule fits comes along unchanged.

Names are written as ``bascule check`` and the report show them: in letters, not
in modified UTF-7, with the separator and the prefix of the legacy server.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from imapclient import imap_utf7

from bascule.imap import folder_names
from bascule.imap.names import Place, readable
from bascule.imap.reader import Layout, ListedFolder, Reader

Kind = Literal["name", "pattern", "special-use", "exchange-items", "common-names"]
#: once: only the messages that are in no other folder that comes along.
Action = Literal["leave-out", "copy", "once"]


@dataclass(frozen=True, slots=True)
class FolderRule:
    """A row of ``folder_rule``.

    ``kind`` says what ``folder`` is: a name, a pattern in which ``*`` stands for
    anything, an attribute of RFC 6154, or nothing. ``name_here`` and
    ``special_use_here`` are what a folder that comes along gets; empty: its own.
    """

    kind: Kind
    folder: str = ""
    action: Action = "leave-out"
    name_here: str = ""
    special_use_here: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "name":
                return f"the rule for the name {self.folder!r}"
            case "pattern":
                return f"the rule for the pattern {self.folder!r}"
            case "special-use":
                return f"the rule for the special use {self.folder}"
            case "exchange-items":
                return "the rule for Exchange's calendars, contacts, journals, notes and tasks"
        return "the rule for common names"

    def as_json(self) -> dict[str, str]:
        """As it is kept in the report of a move."""
        return asdict(self)


#: Where a server shows the messages of all folders once more (RFC 6154 section 2; RFC 8457 section 3).
GMAIL = (
    FolderRule("special-use", "\\All", "once", "Archive", "\\Archive"),
    FolderRule("special-use", "\\Flagged"),
    FolderRule("special-use", "\\Important"),
)
VIEWS = frozenset({"\\Flagged", "\\Important"})


@dataclass(frozen=True, slots=True)
class Traits:
    """What the rules must know of a server."""

    is_exchange: bool = False
    #: Whether it names messages that are in several folders by X-GM-MSGID.
    has_message_ids: bool = False

    @classmethod
    def of(cls, reader: Reader) -> Traits:
        return cls(reader.profile.name == "Exchange", reader.announces("X-GM-EXT-1"))


@dataclass(frozen=True, slots=True)
class Arranged:
    """What the rules make of a mailbox.

    ``layout`` has the folders that come along, with the special uses that they
    get. ``renamed`` is by name on the wire what a folder is called instead, also
    on the wire. ``left_out`` are the others that have messages, each with the
    reason in words. ``once`` is the folder of which only those messages come that are in no
    other folder of ``layout``, or empty. ``unused`` are the rules that fit nothing here.
    """

    layout: Layout
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    once: str = ""
    notes: tuple[str, ...] = ()
    unused: tuple[FolderRule, ...] = ()

    def in_words(self, places: Mapping[str, Place]) -> list[str]:
        """What comes along otherwise than it is, because a rule says so."""
        separator, prefix = self.layout.separator, self.layout.prefix
        names = {name: readable(places[name].name(separator, prefix)) for name in self.renamed}
        kept = [f"the folder {readable(name)!r} is kept as {here!r}, as a rule says" for name, here in names.items()]
        return [*kept, *self.notes]


class FolderRules:
    """The rules of one domain."""

    def __init__(self, rules: Iterable[FolderRule] = ()) -> None:
        self.rules = tuple(rules)
        self._patterns = sorted(
            ((rule, _pattern(rule.folder)) for rule in self.rules if rule.kind == "pattern"),
            key=lambda each: (-len(each[0].folder), each[0].folder),
        )

    def arrange(self, layout: Layout, traits: Traits) -> Arranged:
        """What comes along of a mailbox."""
        items = self._items(layout, traits)
        decided = {
            folder.name: rule
            for folder in layout.folders
            if folder.name != "INBOX" and (rule := self._rule_of(folder, items)) is not None
        }
        if traits.has_message_ids:
            decided = dict(_with_built_in(layout, decided))
        folders, left_out, renamed = [], {}, {}
        notes: list[str] = []
        once = ""
        for folder in layout.folders:
            rule = decided.get(folder.name)
            if rule is None:
                folders.append(folder)
            elif rule.action == "leave-out":
                if folder.selectable:
                    left_out[folder.name] = _why(rule, self.rules)
            else:
                folders.append(folder)
                if rule.name_here:
                    renamed[folder.name] = _name_here(rule, folder.name)
                if rule.action == "once" and folder.selectable:
                    if traits.has_message_ids and not once:
                        once = folder.name
                        notes.append(
                            f"of the folder {readable(folder.name)!r} only the messages come along that are in no other"
                        )
                    elif not traits.has_message_ids:
                        notes.append(
                            f"the folder {readable(folder.name)!r} comes along whole, though the rule says once: "
                            "the legacy server does not say which messages are in other folders, too"
                        )
        given = {
            name: rule.special_use_here
            for name, rule in decided.items()
            if rule.special_use_here and rule.action != "leave-out"
        }
        if any(rule.kind == "common-names" for rule in self.rules):
            given |= self._by_common_names(layout, folders, given, notes)
        used = {id(rule) for rule in decided.values()}
        return Arranged(
            replace(layout, folders=tuple(_with_uses(folders, given, notes))),
            renamed,
            left_out,
            once,
            tuple(notes),
            tuple(rule for rule in self.rules if id(rule) not in used and rule.kind != "common-names"),
        )

    def _rule_of(self, folder: ListedFolder, items: frozenset[str]) -> FolderRule | None:
        """The rule of the domain's that decides a folder."""
        text = _comparable(readable(folder.name))
        for rule in self.rules:
            if rule.kind == "name" and _comparable(rule.folder) == text:
                return rule
        for rule, pattern in self._patterns:
            if pattern.fullmatch(text):
                return rule
        for rule in self.rules:
            if rule.kind == "special-use" and rule.folder.lower() in folder.attributes:
                return rule
        return next((rule for rule in self.rules if rule.kind == "exchange-items" and folder.name in items), None)

    def _items(self, layout: Layout, traits: Traits) -> frozenset[str]:
        """The folders in which Exchange keeps what is no mail: where a language's names are there together."""
        if not traits.is_exchange or not any(rule.kind == "exchange-items" for rule in self.rules):
            return frozenset()
        heads = {folder.name: _head(folder, layout.prefix) for folder in layout.folders}
        known = set(heads.values())
        names = {
            each
            for language in folder_names.EXCHANGE_ITEMS.values()
            if len(language & known) >= folder_names.AT_LEAST
            for each in language
        }
        return frozenset(name for name, head in heads.items() if head in names)

    def _by_common_names(
        self, layout: Layout, folders: list[ListedFolder], given: Mapping[str, str], notes: list[str]
    ) -> dict[str, str]:
        """The special use of each folder whose name says it, where the server says none of any."""
        if any(folder.special_use for folder in layout.folders):
            return {}
        found = {}
        for use, common in folder_names.SPECIAL_USES.items():
            if use in given.values():
                continue
            fitting = [
                folder.name
                for folder in folders
                if folder.selectable
                and folder.name != "INBOX"
                and folder.name not in given
                and _within(folder, layout.prefix) == (_head(folder, layout.prefix),)
                and _head(folder, layout.prefix) in common
            ]
            if len(fitting) == 1:
                found[fitting[0]] = use
            elif fitting:
                names = ", ".join(repr(readable(name)) for name in fitting)
                notes.append(f"none of {names} is shown as {use}: each has a name of such a folder")
        return found


def _with_built_in(layout: Layout, decided: Mapping[str, FolderRule]) -> Iterator[tuple[str, FolderRule]]:
    """What the domain's rules decide, and for the other folders what is built in for Gmail.

    What is in a view of all messages is left out of the others only while it comes along itself.
    """
    yield from decided.items()
    comes = False
    for rule in GMAIL:
        for folder in layout.folders:
            if rule.folder.lower() not in folder.attributes or folder.name == "INBOX":
                continue
            if rule.action == "once":
                comes |= folder.name not in decided or decided[folder.name].action != "leave-out"
            if folder.name not in decided and (rule.action != "leave-out" or comes):
                yield folder.name, rule


def _with_uses(folders: list[ListedFolder], given: Mapping[str, str], notes: list[str]) -> Iterator[ListedFolder]:
    """The folders with the special uses that they are given; who had one of these has none."""
    for folder in folders:
        use = given.get(folder.name, folder.special_use)
        if folder.name not in given and use in given.values():
            notes.append(
                f"the folder {readable(folder.name)!r} is not shown as {use} here, for a rule gives it to another"
            )
            use = ""
        elif folder.name in given and use != folder.special_use:
            notes.append(f"the folder {readable(folder.name)!r} is shown as {use} here, as a rule says")
        yield replace(folder, special_use=use)


def _why(rule: FolderRule, rules: tuple[FolderRule, ...]) -> str:
    if any(rule is each for each in rules):
        return str(rule)
    return f"its messages are in other folders, too ({rule.folder}, built in for Gmail)"


def _name_here(rule: FolderRule, name: str) -> str:
    """The name that a rule gives, on the wire; what ``*`` stood for goes where the new name has it."""
    text = rule.name_here
    if rule.kind == "pattern":
        match = _pattern(rule.folder).fullmatch(_comparable(readable(name)))
        text = text.replace("*", match[1] if match else "")
    encoded: str = imap_utf7.encode(text).decode("ascii")
    return encoded


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in _comparable(text).split("*")), re.DOTALL)


def _comparable(text: str) -> str:
    """Letters that look the same are the same (Unicode Standard Annex 15): nobody sees how they are composed."""
    return unicodedata.normalize("NFC", text)


def _within(folder: ListedFolder, prefix: str) -> tuple[str, ...]:
    """The path of a folder below the prefix, in lower case."""
    name = folder.name.removeprefix(prefix)
    parts = name.split(folder.delimiter) if folder.delimiter else [name]
    return tuple(_comparable(readable(part)).lower() for part in parts)


def _head(folder: ListedFolder, prefix: str) -> str:
    return _within(folder, prefix)[0]
