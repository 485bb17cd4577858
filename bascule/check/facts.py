"""What Postfix and Dovecot of this host are told, from the output of their own commands; nothing is changed.

The commands of :data:`COMMANDS` may also have been run elsewhere and kept: an
Ansible role that must change nothing yet hands their output over.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

from bascule.errors import BasculeError

#: What a host is asked for the checks that need no domain.
COMMANDS = (
    "postconf -x",
    "postconf -n",
    "postconf -M",
    "postconf -P",
    "doveconf -n",
    "doveconf -h auth_username_format auth_mechanisms first_valid_uid last_valid_uid recipient_delimiter ssl_ca",
)
TIMEOUT = 20.0  # seconds for one command
#: Postfix's and Dovecot's places, which cron and systemd leave out of PATH at times.
_PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"


class NotReadable(BasculeError):
    """A server is not on this host, or does not say how it is configured."""


class Output(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    text: str
    errors: str


class Commands(Protocol):
    """Who runs a command of Postfix or Dovecot, for the configuration that is looked at."""

    def run(self, *command: str) -> Output:
        """
        Raises:
            NotReadable: it cannot be run, or does not end in time.
        """


class Here:
    """Commands that are run on this host."""

    def __init__(self, postfix: Path, dovecot: Path) -> None:
        """``postfix`` is Postfix's configuration directory, ``dovecot`` Dovecot's configuration file."""
        self._postfix = postfix
        self._dovecot = dovecot

    def run(self, *command: str) -> Output:
        program, *arguments = command
        if program.startswith("dove"):
            arguments = ["-c", str(self._dovecot), *arguments]
        try:
            done = subprocess.run(
                [program, *arguments],
                env=os.environ
                | {"MAIL_CONFIG": str(self._postfix), "PATH": f"{_PLACES}:{os.environ.get('PATH', '')}", "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT,
                check=False,
            )
        except OSError as error:
            raise NotReadable(f"{program}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise NotReadable(f"{' '.join(command)} did not end within {TIMEOUT:.0f} s") from error
        return Output(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


class Once:
    """Commands whose output is kept: for many looks at the same host. Threads may share it."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._outputs: dict[tuple[str, ...], Output] = {}
        self._lock = Lock()

    def run(self, *command: str) -> Output:
        with self._lock:
            if command not in self._outputs:
                self._outputs[command] = self._commands.run(*command)
            return self._outputs[command]


class Kept:
    """The output of commands that were run before, by the command as it is in :data:`COMMANDS`."""

    def __init__(self, outputs: Mapping[str, str]) -> None:
        self._outputs = outputs

    def run(self, *command: str) -> Output:
        try:
            return Output(0, self._outputs[" ".join(command)], "")
        except KeyError:
            raise NotReadable(f"the output of {' '.join(command)} was not kept") from None


def _said(commands: Commands, *command: str) -> str:
    done = commands.run(*command)
    if done.status != 0:
        last = (done.errors.strip().splitlines() or [f"exit status {done.status}"])[-1]
        raise NotReadable(f"{command[0]}: {last}")
    return done.text


# Postfix --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Service:
    """A line of master.cf (master(5)), with its ``-o`` overrides."""

    name: str
    kind: str
    chrooted: bool
    command: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """As an operator finds it."""
        return f"{self.name} {self.kind} ... {self.command}"


class PostfixFacts:
    """The parameters and services of a Postfix.

    Raises:
        NotReadable: it does not say.
    """

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._values = _parameters(_said(commands, "postconf", "-x"))
        self._own = _parameters(_said(commands, "postconf", "-n"))

    def value(self, parameter: str) -> str:
        """Its value, with ``$name`` replaced; empty if there is none."""
        return self._values.get(parameter, "")

    def is_own(self, parameter: str) -> bool:
        """Whether main.cf says it, rather than Postfix's default."""
        return parameter in self._own

    @cached_property
    def services(self) -> tuple[Service, ...]:
        """The services of master.cf."""
        options: dict[str, dict[str, str]] = {}
        for line in _said(self._commands, "postconf", "-P").splitlines():
            key, _, value = line.partition("=")
            name, _, parameter = key.strip().rpartition("/")
            options.setdefault(name, {})[parameter] = self._expanded(value.strip())
        found = []
        for line in _said(self._commands, "postconf", "-M").splitlines():
            fields = line.split()
            if len(fields) >= 8:
                name, kind, chroot, command = fields[0], fields[1], fields[4], fields[7]
                # Whether "-" means y depends on the version (postconf(5), compatibility_level).
                chrooted = chroot == "y" or (chroot == "-" and _level(self.value("compatibility_level")) < 1)
                found.append(Service(name, kind, chrooted, command, options.get(f"{name}/{kind}", {})))
        return tuple(found)

    def of_service(self, service: Service, parameter: str) -> str:
        """The value for one service."""
        return service.options.get(parameter, self.value(parameter))

    def smtp_servers(self) -> Iterator[Service]:
        """Those that take mail by SMTP; postscreen(8) hands it on to one of them."""
        return (each for each in self.services if each.command == "smtpd")

    def lookup(self, table: str, key: str) -> str | None:
        """What a lookup table has for a key, None if nothing.

        Raises:
            NotReadable: it cannot be asked.
        """
        done = self._commands.run("postmap", "-q", key, table)
        if done.status == 0:
            return done.text.strip()
        # Warnings are about main.cf: a parameter that is set twice, for instance. What cannot be asked ends fatally.
        errors = [line for line in done.errors.strip().splitlines() if "warning:" not in line]
        if done.status == 1 and not errors:
            return None
        raise NotReadable((errors or [f"exit status {done.status}"])[-1])

    def listing(self, table: str) -> Iterator[tuple[str, str]]:
        """All that a lookup table has, if it is of a kind that says so (postmap(1), ``-s``); otherwise nothing."""
        done = self._commands.run("postmap", "-s", table)
        for line in done.text.splitlines() if done.status == 0 else ():
            key, _, found = line.partition("\t")
            yield key, found

    def queue(self) -> str:
        """What waits, as ``postqueue -j`` prints it."""
        return _said(self._commands, "postqueue", "-j")

    def _expanded(self, value: str) -> str:
        return re.sub(r"\$[({]?(\w+)[)}]?", lambda found: self.value(found[1]), value)


def _parameters(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in lines}


def _level(text: str) -> float:
    try:
        return float(".".join(text.split(".")[:2]) or 0)
    except ValueError:
        return 0


def items(value: str) -> Iterator[str]:
    """The items of a list of Postfix's: apart by spaces and commas, but within braces (postconf(5), "{")."""
    depth, item = 0, ""
    for character in value:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0 and character in ", \t\r\n":
            if item:
                yield item
            item = ""
        else:
            item += character
    if item:
        yield item


# Dovecot ---------------------------------------------------------------------------


@dataclass(slots=True)
class Block:
    """``kind name { ... }`` of a Dovecot's configuration."""

    kind: str = ""
    name: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def all(self, kind: str) -> list[Block]:
        """The blocks of a kind in it."""
        return [each for each in self.blocks if each.kind == kind]

    def named(self, kind: str, name: str) -> Block | None:
        return next((each for each in self.all(kind) if each.name == name), None)

    def get(self, setting: str, otherwise: str = "") -> str:
        return self.settings.get(setting, otherwise)


class DovecotFacts:
    """The settings of a Dovecot, as ``doveconf -n`` prints them, without defaults.

    Raises:
        NotReadable: it does not say.
    """

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        text = _said(commands, "doveconf", "-n")
        self.text = text
        found = re.match(r"# (\d+\.\d+)", text)
        self.version = found[1] if found else "2.3"
        self.root = parsed(text)
        names = COMMANDS[-1].split()[2:]
        values = self._said_of(names)
        self._values = dict(zip(names, values, strict=True))

    def _said_of(self, names: list[str]) -> list[str]:
        try:
            said = _said(self._commands, *COMMANDS[-1].split()).splitlines()
            if len(said) == len(names):
                return said
        except NotReadable:
            pass  # 2.4 has not every setting that 2.3 has
        return [self.root.get(name) for name in names]

    def value(self, setting: str) -> str:
        """A setting outside of blocks, with its default."""
        return self.root.settings.get(setting, self._values.get(setting, ""))

    @property
    def protocols(self) -> frozenset[str]:
        block = next(iter(self.root.all("protocols")), None)
        if block is not None:  # 2.4
            return frozenset(name for name, value in block.settings.items() if value == "yes")
        return frozenset(self.value("protocols").strip('" ').split())

    def plugin(self, setting: str) -> str:
        """A setting of 2.3's ``plugin { }``."""
        return next((each.get(setting) for each in self.root.all("plugin") if setting in each.settings), "")

    def blocks(self, kind: str) -> list[Block]:
        """The blocks of a kind, in the order in which Dovecot has them."""
        return self.root.all(kind)

    def whole(self, kind: str) -> list[Block]:
        """As :meth:`blocks`, with what ``doveconf -n`` hides: whatever stands behind ``key=``, for instance.

        Raises:
            NotReadable: it does not say.
        """
        return parsed(_said(self._commands, "doveconf", "-P", kind)).all(kind)

    def user(self, *arguments: str) -> Output:
        """``doveadm user``, for the running Dovecot."""
        return self._commands.run("doveadm", "user", *arguments)

    def reload(self) -> None:
        """Have the running Dovecot read its configuration anew (doveadm(1)); sessions go on.

        Raises:
            NotReadable: it does not.
        """
        _said(self._commands, "doveadm", "reload")


def parsed(text: str) -> Block:
    """The tree of a text that doveconf printed."""
    root = Block()
    stack = [root]
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line == "}":
            stack.pop()
        elif line.endswith("{") and "=" not in line.partition("{")[0]:
            kind, _, name = line[:-1].strip().partition(" ")
            block = Block(kind, name.strip().strip('"'))
            stack[-1].blocks.append(block)
            stack.append(block)
        else:
            name, _, value = line.partition("=")
            stack[-1].settings[name.strip()] = value.strip()
    return root
