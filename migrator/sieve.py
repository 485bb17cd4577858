"""Sieve scripts: read from the legacy server by ManageSieve (RFC 5804), written where Pigeonhole looks for them.

Scripts are bytes: RFC 5804 wants UTF-8, users' scripts are what their editor wrote.
Nothing about them is a reason not to move; what does not come along as it was is named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import BasculeError
from bascule.legacy import LegacySettings, MasterLogin, Service, Trust, plain
from bascule.migrator.conversation import Conversation

SECONDS = 60.0  # that the whole session may take
MOST = 64 << 20  # bytes that the server may send in all
MAX_SCRIPT = 1 << 20  # bytes
MAX_SCRIPTS = 1000
MAX_LINE = 8192  # bytes
PATIENCE = 30  # seconds for one of Dovecot's commands
MAX_FILE_NAME = 255  # bytes (NAME_MAX)
RECORD = ".bascule-sieve.json"  # in the user's home
ENDING = ".sieve"

_TOKEN = re.compile(rb' *(?:"((?:[^"\\]|\\.)*)"|([^ "{]+))')
_LITERAL = re.compile(rb" *\{(\d{1,12})\+?\}$")
#: What Pigeonhole takes in no name (lib-sieve, sieve_script_name_is_valid), and what no file system does.
_NOT_IN_A_NAME = re.compile("[\x00-\x1f/\x7f-\x9f\xff\u2028\u2029\ud800-\udfff]")
_UNKNOWN_EXTENSION = re.compile(r"unknown Sieve capability [`']([^`']+)'")


class ScriptsNotRead(BasculeError):
    """The legacy server does not give the Sieve scripts."""


@dataclass(frozen=True, slots=True)
class Scripts:
    """A user's scripts: the bytes by name, the name of the active one or nothing, and what could not be read."""

    bodies: Mapping[str, bytes]
    active: str
    unread: Mapping[str, str] = field(default_factory=dict)


# Reading ----------------------------------------------------------------------------


def read_scripts(
    legacy: LegacySettings,
    service: Service,
    trust: Trust,
    address: Address,
    password: Password | MasterLogin,
    *,
    host: str | None = None,
    seconds: float = SECONDS,
) -> Scripts:
    """The user's scripts. ``host`` is where ManageSieve is served, by default where IMAP is.

    ``password``: the user's, or a master user who may act as any.

    Raises:
        ScriptsNotRead, LegacyUnavailable
    """
    name = host or legacy.imap_host
    with Conversation("ManageSieve", name, service, trust, seconds=seconds, most=MOST) as conversation:
        session = _Session(conversation)
        session.answer()
        if service.tls == "starttls":
            session.command(b"STARTTLS")
            conversation.secure()
            session.answer()
        session.command(b'AUTHENTICATE "PLAIN" "%s"' % b64encode(plain(legacy.login_name(address), password)))
        names, active = [], ""
        for listed in session.command(b"LISTSCRIPTS"):
            if not listed or not isinstance(listed[0], bytes):
                raise ScriptsNotRead("the ManageSieve server does not list scripts as RFC 5804 has it")
            names.append(listed[0])
            if len(listed) > 1 and str(listed[1]).upper() == "ACTIVE":
                active = _text(listed[0])
        bodies: dict[str, bytes] = {}
        unread: dict[str, str] = {}
        for number, script in enumerate(names):
            try:
                bodies[_text(script)] = session.script(script)
            except _Refused as error:
                unread[_text(script)] = error.message
            except BasculeError as error:  # nothing more comes in this session
                unread |= {_text(each): error.message for each in names[number:]}
                break
        return Scripts(bodies, active, unread)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class _Refused(ScriptsNotRead):
    """NO to a command; the session goes on."""


class _Session:
    """Commands and answers on a ManageSieve connection (RFC 5804 section 4)."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def command(self, line: bytes) -> list[list[bytes | str]]:
        self._conversation.send(line + b"\r\n")
        return self.answer()

    def script(self, name: bytes) -> bytes:
        """
        Raises:
            _Refused: the server does not give it, or it is too large.
            ScriptsNotRead
        """
        answer = self.command(b"GETSCRIPT {%d+}\r\n%s" % (len(name), name))
        if len(answer) != 1 or len(answer[0]) != 1 or not isinstance(answer[0][0], bytes):
            raise ScriptsNotRead("the ManageSieve server does not give a script as RFC 5804 has it")
        if len(answer[0][0]) > MAX_SCRIPT:
            raise _Refused(f"it is larger than {MAX_SCRIPT >> 20} MiB")
        return answer[0][0]

    def answer(self) -> list[list[bytes | str]]:
        """The lines up to OK, each as its strings (bytes) and words (str).

        Raises:
            _Refused: NO.
            ScriptsNotRead: BYE, or what is no answer.
        """
        lines: list[list[bytes | str]] = []
        while True:
            line = self._line()
            word = line[0].upper() if line and isinstance(line[0], str) else ""
            if word == "OK":
                return lines
            if word in {"NO", "BYE"}:
                text = b" ".join(each for each in line if isinstance(each, bytes)).decode(errors="replace")
                shown = "".join(letter if letter.isprintable() else "?" for letter in text[:200])
                refused = _Refused if word == "NO" else ScriptsNotRead
                raise refused(f"the ManageSieve server says {word} {shown}".rstrip())
            lines.append(line)
            if len(lines) > MAX_SCRIPTS:
                raise ScriptsNotRead(f"the ManageSieve server answers with more than {MAX_SCRIPTS} lines")

    def _line(self) -> list[bytes | str]:
        """One line, with the literals in it; what follows a literal belongs to it."""
        tokens: list[bytes | str] = []
        while True:
            rest = self._conversation.line(MAX_LINE)
            while rest.strip():
                if (literal := _LITERAL.match(rest)) is not None:
                    tokens.append(self._literal(int(literal[1])))
                    break
                if (token := _TOKEN.match(rest)) is None:
                    raise ScriptsNotRead("the ManageSieve server says what is no answer")
                word = token[2]
                tokens.append(
                    word.decode("ascii", "replace") if word is not None else re.sub(rb"\\(.)", rb"\1", token[1])
                )
                rest = rest[token.end() :]
            else:
                return tokens

    def _literal(self, size: int) -> bytes:
        """One more byte than a script may have is enough to know that it is too large."""
        kept = self._conversation.exactly(min(size, MAX_SCRIPT + 1))
        left = size - len(kept)
        while left > 0:
            left -= len(self._conversation.exactly(min(left, MAX_SCRIPT)))
        return kept


# Writing ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where Pigeonhole keeps a user's scripts: their directory, and the link to the active one."""

    folder: Path
    active: Path

    @classmethod
    def default(cls, home: Path) -> Place:
        """``file:~/sieve;active=~/.dovecot.sieve``."""
        return cls(home / "sieve", home / ".dovecot.sieve")

    @classmethod
    def of(cls, setting: str, home: Path, address: Address) -> Place:
        """The place that ``plugin/sieve`` names (Pigeonhole manual, "Script Storage"; nothing: the default).

        Raises:
            ScriptsNotRead: it is none that scripts can be written to as files.
        """
        where = setting.strip()
        if not where:
            return cls.default(home)
        driver, colon, rest = where.partition(":")
        if colon and driver.isalpha() and driver != "file":
            raise ScriptsNotRead(f"Dovecot keeps Sieve scripts in {driver!r} here, and bascule writes files only")
        path, *options = (rest if colon and driver == "file" else where).split(";")
        active = next((each.removeprefix("active=") for each in options if each.startswith("active=")), "")
        default = cls.default(home)
        # The older form, sieve = ~/.dovecot.sieve, names the active script.
        if not active and path.endswith(ENDING):
            return cls(default.folder, _expanded(path, home, address))
        return cls(_expanded(path, home, address), _expanded(active, home, address) if active else default.active)


def place_here(config_file: Path, home: Path, address: Address) -> Place:
    """Where this host's Dovecot looks for a user's scripts: by the userdb, or by its settings.

    Raises:
        ScriptsNotRead: it does not say, or where no files can be written.
    """
    by_user = _said_by("doveadm", "-c", str(config_file), "user", "-f", "sieve", str(address))
    if by_user is not None and by_user.strip():
        return Place.of(by_user, home, address)
    settings = _said_by("doveconf", "-c", str(config_file), "-n")
    if settings is None:
        raise ScriptsNotRead("doveconf does not say where Sieve scripts are kept here")
    return Place.of(personal_storage(settings), home, address)


def personal_storage(settings: str) -> str:
    """The users' own scripts in what ``doveconf -n`` says, in the words of Dovecot 2.3; nothing: the default."""
    for block in re.findall(r"^sieve_script [^{\n]*\{\n(.*?)^\}", settings, re.MULTILINE | re.DOTALL):  # 2.4
        values = dict(re.findall(r"^  (\w+) = (.*)$", block, re.MULTILINE))
        if values.get("type", "personal") == "personal" and "path" in values:
            active = f";active={values['active_path']}" if "active_path" in values else ""
            return f"{values.get('driver', 'file')}:{values['path']}{active}"
    plugin = re.search(r"^plugin \{\n(.*?)^\}", settings, re.MULTILINE | re.DOTALL)
    found = re.search(r"^  sieve = (.*)$", plugin[1], re.MULTILINE) if plugin else None
    return found[1] if found else ""


def _said_by(*command: str) -> str | None:
    """What a command prints; None if it fails or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def _expanded(path: str, home: Path, address: Address) -> Path:
    """Dovecot's variables and ~ (Dovecot manual, "Config Variables").

    Raises:
        ScriptsNotRead: there is another variable in it.
    """
    user = str(address)
    values = {"u": user, "n": address.local_part, "d": address.domain, "h": str(home)}
    values |= {"user": user, "username": values["n"], "domain": values["d"], "home": values["h"]}
    values |= {"user|username": values["n"], "user | username": values["n"]}
    values |= {"user|domain": values["d"], "user | domain": values["d"]}

    def value(match: re.Match[str]) -> str:
        name = match["long"].strip() if match["long"] is not None else match["short"]
        if name not in values:
            raise ScriptsNotRead(f"bascule does not know the variable {match[0]} in Dovecot's place for Sieve scripts")
        return values[name].lower() if match["modifier"] else values[name]

    text = re.sub(r"%(?P<modifier>L?)(?:\{(?P<long>[^}]*)\}|(?P<short>.))", value, path)
    if text == "~" or text.startswith("~/"):
        return Path(f"{home}{text[1:]}")
    return home / text


def write_scripts(home: Path, scripts: Scripts, place: Place | None = None) -> list[str]:
    """Write the scripts to ``place``, by default where Pigeonhole looks by itself; what is to be said of it, in words.

    A script that the user has changed or made here stays. One that an earlier move
    has brought and nobody changed is brought up to date.
    """
    where = place or Place.default(home)
    notes = [f"the Sieve script {name!r} was not read: {reason}" for name, reason in scripts.unread.items()]
    try:
        notes += _Writing(home, where).write(scripts)
    except OSError as error:
        notes.append(f"Sieve scripts were not all written: {error.strerror}: {error.filename}")
    return notes


class _Writing:
    """What was written here so far, and what is there now.

    The record of it has every digest that was ever written under a name, and is
    on the disk before the script: who dies in between leaves nothing that looks
    like the user's own.
    """

    def __init__(self, home: Path, place: Place) -> None:
        self._place = place
        self._record = home / RECORD
        self._digests: dict[str, list[str]] = {}
        self._active: list[str] = []
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            self._digests = {str(file): list(map(str, seen)) for file, seen in record["scripts"].items()}
            self._active = list(map(str, record["active"]))
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            pass  # then what is here counts as the user's

    def write(self, scripts: Scripts) -> Iterator[str]:
        """Write them; what is to be said, as it happens."""
        files = _file_names(scripts.bodies)
        kept: list[str] = []
        updated: list[str] = []
        for name, body in scripts.bodies.items():
            if files[name] != name + ENDING:
                yield f"the Sieve script {name!r} has the name {files[name].removesuffix(ENDING)!r} here"
            try:
                # On the wire lines end in CRLF; in files of this host in LF.
                done = self._write(files[name], body.replace(b"\r\n", b"\n"))
            except OSError as error:
                yield f"the Sieve script {name!r} was not written: {error.strerror}"
                continue
            if done == "kept":
                kept.append(name)
            elif done == "updated":
                updated.append(name)
        updated += self._remove_others(set(files.values()), unread=bool(scripts.unread))
        if kept:
            yield f"Sieve scripts that were changed or made here stay as they are here: {_listed(kept)}"
        if updated:
            yield f"Sieve scripts of an earlier move were brought up to date: {_listed(updated)}"
        if scripts.active and _content(self._place.folder / files.get(scripts.active, "")) is None:
            yield f"the active Sieve script {scripts.active!r} is not here, so that none filters"
        elif not self._activate(files.get(scripts.active, "")):
            yield f"the Sieve script that was made active here stays so; on the legacy server it is {scripts.active!r}"

    def _write(self, file: str, body: bytes) -> str:
        """``new``, ``same``, ``updated``, or ``kept``: it is the user's."""
        path = self._place.folder / file
        seen = self._digests.setdefault(file, [])
        there = _content(path)
        if there == body:
            return "same"
        if there is not None and _digest(there) not in seen:
            return "kept"
        seen.append(_digest(body))
        self._write_record()
        self._place.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(path, body)
        return "new" if there is None else "updated"

    def _remove_others(self, files: set[str], *, unread: bool) -> list[str]:
        """Remove what an earlier move brought, nobody changed, and the legacy server no longer has."""
        gone = []
        for file, seen in self._digests.items():
            path = self._place.folder / file
            if file in files or unread or (there := _content(path)) is None or _digest(there) not in seen:
                continue
            path.unlink()
            gone.append(file.removesuffix(ENDING))
        return gone

    def _activate(self, file: str) -> bool:
        """Have a script be the active one, or none; False if the user has chosen another."""
        link = self._place.active
        try:
            now = os.readlink(link)  # noqa: PTH115 (as it is written)
        except FileNotFoundError:
            now = ""
        except OSError:  # a file
            return False
        wanted = os.path.relpath(self._place.folder / file, link.parent) if file else ""
        if now == wanted:
            return True
        if now and now not in self._active and (link.parent / now).exists():
            return False
        if now:
            link.unlink()
        if wanted:
            self._active.append(wanted)
            self._write_record()
            link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            link.symlink_to(wanted)
        return True

    def _write_record(self) -> None:
        text = json.dumps({"scripts": self._digests, "active": self._active})
        _replace(self._record, text.encode())


def unknown_extensions(config_file: Path, place: Place) -> list[str]:
    """What scripts require and this host's Pigeonhole does not have, in words; nothing where it cannot be asked."""
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(place.folder.glob(f"*{ENDING}")):
            try:
                done = subprocess.run(
                    ["sievec", "-c", str(config_file), str(path), f"{folder}/compiled"],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=PATIENCE,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired):
                return []
            unknown = sorted(set(_UNKNOWN_EXTENSION.findall(done.stderr.decode(errors="replace"))))
            if unknown:
                notes.append(
                    f"the Sieve script {path.stem!r} needs what is not here, and will not run: {_listed(unknown)}"
                )
    return notes


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """The file of each script: its name where Pigeonhole and the file system take it, or else the nearest one."""
    found: dict[str, str] = {}
    # Those that can keep their names do.
    for name in sorted(names, key=lambda each: _nearest(each) != each + ENDING):
        number = 1
        while (file := _nearest(name, "" if number == 1 else f"-{number}")) in found.values():
            number += 1
        found[name] = file
    return found


def _nearest(name: str, tail: str = "") -> str:
    legal = _NOT_IN_A_NAME.sub("_", name)
    if not legal or legal.startswith("."):
        legal = "_" + legal[1:]
    room = MAX_FILE_NAME - len(tail + ENDING)
    return legal.encode()[:room].decode(errors="ignore") + tail + ENDING


def _content(path: Path) -> bytes | None:
    """What is in a file; None if there is none."""
    return path.read_bytes() if path.is_file() else None


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _replace(path: Path, body: bytes) -> None:
    """Write a file atomically and durably."""
    new = path.with_name(".bascule.new")  # the name itself may have no room for an ending
    with new.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)
