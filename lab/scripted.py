"""An IMAP server that does as a script says, for what no real server can be made to do.

:class:`Server` is a small, correct server in threads; a test overrides the
answer that its odd server gives. What it can be made to do is what servers
were seen to do: answers that are missing, twice, in parts or of the wrong
length, delays, drips, resets, limits of sessions, TLS.

:class:`Script` is less: a socket that says what is known beforehand, for tests
of what reads from it.
"""

from __future__ import annotations

import base64
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

DATE = b'"03-Jun-2012 07:08:09 +0200"'


class Script:
    """Says what is known beforehand, at most ``step`` bytes at a time, then nothing; ``sent`` is what was sent to it.

    It is a :class:`bascule.imap.wire.Stream`. ``failure`` is raised when all is said.
    """

    def __init__(self, *answers: bytes, step: int = 1 << 16, failure: OSError | None = None) -> None:
        self._failure = failure
        self.is_closed = False
        self._rest = memoryview(b"".join(answers))
        self._step = step
        self.sent = b""

    def recv(self, size: int) -> bytes:
        if not self._rest and self._failure is not None:
            raise self._failure
        piece = bytes(self._rest[: min(size, self._step)])
        self._rest = self._rest[len(piece) :]
        return piece

    def send(self, data: memoryview) -> int:
        self.sent += data
        return len(data)

    def settimeout(self, _seconds: float) -> None:
        """It never waits."""

    def close(self) -> None:
        self.is_closed = True


def mail(name: str, text: str = "a line of text", header: str = "") -> bytes:
    """A message whose Subject and Message-ID are ``name``."""
    head = f"From: sender@far.test\r\nTo: user@here.test\r\nSubject: {name}\r\nMessage-ID: <{name}@far.test>\r\n"
    return f"{head}{header}\r\n{text}\r\n".encode()


@dataclass
class Mail:
    """A message as the server has it; ``size`` is what it says, if not the length of ``body``.

    ``message_id`` is Gmail's number of it, which it has in every folder; 0: it has none.
    """

    uid: int
    body: bytes
    flags: bytes = b""
    date: bytes = DATE
    size: bytes | None = None
    message_id: int = 0


@dataclass
class Folder:
    """``listed``: how LIST and STATUS spell the name, if not as a quoted string.

    ``least_next``: UIDNEXT is no lower, whatever was taken out.
    """

    name: bytes
    mails: list[Mail] = field(default_factory=list)
    attributes: bytes = b""
    delimiter: bytes = b'"/"'
    uidvalidity: int = 1_234_567_890
    listed: bytes | None = None
    least_next: int = 1

    @property
    def uidnext(self) -> int:
        return max(self.least_next, 1 + max((each.uid for each in self.mails), default=0))

    def spelled(self) -> bytes:
        """The name as LIST and STATUS give it."""
        if self.listed is not None:
            return self.listed
        return b'"' + self.name.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


@dataclass(frozen=True)
class Command:
    """A command of the client: ``words`` are its arguments without quotes, ``text`` all of them as they came."""

    tag: bytes
    verb: bytes
    words: list[bytes]
    text: bytes


class Over(Exception):
    """The session is over."""


class Server:
    """Serves ``folders`` to the user ``u`` with the password ``secret``, on a free port of the loopback.

    What is odd is put into a subclass: ``on_...`` answers a command, ``item``
    writes one item of a FETCH, ``fetch_line`` a whole response.
    """

    capabilities = b"IMAP4rev1 AUTH=PLAIN NAMESPACE UIDPLUS"
    greeting = b"* OK ready\r\n"
    namespace = b'(("" "/")) NIL NIL'
    login_code = True  # whether the answer to the login names the capabilities
    max_sessions = 100
    over_limit = b"NO [LIMIT] too many sessions"
    #: Certificate and key, and whether TLS begins at once.
    certificate: tuple[Path, Path] | None = None
    implicit_tls = False

    def __init__(self, folders: list[Folder] | None = None, users: dict[str, str] | None = None) -> None:
        self.folders = folders if folders is not None else [Folder(b"INBOX")]
        self.users = {name.encode(): word.encode() for name, word in (users or {"u": "secret"}).items()}
        #: Every command that came, and every login with its password.
        self.log: list[bytes] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all sessions."""
        self.stopped.set()
        # close() alone leaves accept() waiting.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(10)
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.shut()
        for thread in self._threads:
            thread.join(10)

    @property
    def open_sessions(self) -> int:
        with self._lock:
            return len(self._sessions)

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            session = Session(self, connection)
            with self._lock:
                self._sessions.append(session)
            thread = threading.Thread(target=self._serve, args=(session,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, session: Session) -> None:
        try:
            session.run()
        except (Over, OSError):
            pass
        finally:
            self.count_out(session)
            session.shut()

    def count_out(self, session: Session) -> None:
        """Count a session no more."""
        with self._lock:
            if session in self._sessions:
                self._sessions.remove(session)

    def folder(self, name: bytes) -> Folder | None:
        """The folder with this name, INBOX in any case."""
        for each in self.folders:
            if each.name == name or each.name.upper() == name.upper() == b"INBOX":
                return each
        return None

    # What a script overrides ----------------------------------------------------

    def refuses_login(self, session: Session, user: bytes, password: bytes) -> bytes | None:  # noqa: ARG002
        """None: it is right; else what is said behind the tag."""
        self.logins.append((user, password))
        if self.users.get(user, self.users.get(user.partition(b"@")[0])) != password:
            return b"NO [AUTHENTICATIONFAILED] wrong"
        return self.over_limit if self.open_sessions > self.max_sessions else None

    def on_authenticate(self, session: Session, command: Command) -> None:
        if command.words[0].upper() != b"PLAIN":
            session.no(command, b"[CANNOT] no such mechanism")
            return
        if len(command.words) < 2:
            session.raw(b"+ \r\n")
        response = command.words[1] if len(command.words) > 1 else session.line()
        _, user, password = base64.b64decode(response).split(b"\0")
        session.log_in(command, user, password)

    def on_list(self, session: Session, command: Command) -> None:
        for folder in self.folders:
            attributes = folder.attributes if command.verb == b"LIST" else b""
            session.say(b"* %s (%s) %s %s" % (command.verb, attributes, folder.delimiter, folder.spelled()))
        session.ok(command)

    on_lsub = on_list

    def on_namespace(self, session: Session, command: Command) -> None:
        session.say(b"* NAMESPACE " + self.namespace)
        session.ok(command)

    def status_items(self, folder: Folder) -> bytes:
        return b"MESSAGES %d UIDNEXT %d UIDVALIDITY %d" % (len(folder.mails), folder.uidnext, folder.uidvalidity)

    def on_status(self, session: Session, command: Command) -> None:
        folder = self.folder(command.words[0])
        if folder is None:
            session.no(command, b"[NONEXISTENT] no such folder")
            return
        session.say(b"* STATUS %s (%s)" % (folder.spelled(), self.status_items(folder)))
        session.ok(command)

    def on_open(self, session: Session, command: Command) -> None:
        """SELECT and EXAMINE."""
        session.folder = self.folder(command.words[0])
        if session.folder is None:
            session.no(command, b"[NONEXISTENT] no such folder")
            return
        session.say(b"* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft)")
        session.say(b"* %d EXISTS" % len(session.folder.mails))
        session.say(b"* OK [UIDVALIDITY %d] valid" % session.folder.uidvalidity)
        session.say(b"* OK [UIDNEXT %d] next" % session.folder.uidnext)
        session.ok(command)

    def item(self, mail: Mail, name: bytes) -> bytes:
        """One item of a FETCH response, with its name; nothing: it is left out."""
        match name:
            case b"UID":
                return b"UID %d" % mail.uid
            case b"FLAGS":
                return b"FLAGS (%s)" % mail.flags
            case b"INTERNALDATE":
                return b"INTERNALDATE " + mail.date
            case b"RFC822.SIZE":
                return b"RFC822.SIZE " + (b"%d" % len(mail.body) if mail.size is None else mail.size)
            case b"X-GM-MSGID":
                return b"X-GM-MSGID %d" % mail.message_id if mail.message_id else b""
            case b"BODY.PEEK[]":
                return b"BODY[] {%d}\r\n%s" % (len(mail.body), mail.body)
            case b"BODY.PEEK[HEADER.FIELDS":
                head = mail.body.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
                return b"BODY[HEADER.FIELDS (RECEIVED DATE)] {%d}\r\n%s" % (len(head), head)
        if name.startswith(b"BODY.PEEK[]<"):
            return b"BODY[]<0> {%d}\r\n%s" % (len(mail.body[:64]), mail.body[:64])
        return b""

    def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:  # noqa: ARG002
        """One or more whole responses, without the last line end."""
        return b"* %d FETCH (%s)" % (number, b" ".join(filter(None, (self.item(mail, name) for name in names))))

    def on_fetch(self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]) -> None:
        for number, each in mails:
            session.say(self.fetch_line(session, number, each, names))
        session.ok(command)

    def on_search(self, session: Session, command: Command, *, by_uid: bool) -> None:
        folder = session.folder
        found = [(number, each) for number, each in enumerate(folder.mails if folder else [], 1)]
        if b"HEADER" in command.text.upper():
            found = [each for each in found if command.words[-1] in each[1].body]
        if b"DELETED" in command.text.upper():
            found = [each for each in found if b"\\Deleted" in each[1].flags]
        session.say(b"* SEARCH" + b"".join(b" %d" % (each.uid if by_uid else number) for number, each in found))
        session.ok(command)

    def on_append(self, session: Session, command: Command) -> None:
        folder = self.folder(command.words[0])
        if folder is None:
            session.no(command, b"[TRYCREATE] no such folder")
            return
        folder.mails.append(Mail(folder.uidnext, command.words[-1], b"", DATE))
        session.say(b"%s OK [APPENDUID %d %d] done" % (command.tag, folder.uidvalidity, folder.mails[-1].uid))

    def on_other(self, session: Session, command: Command) -> None:
        """Any command that is not known here."""
        session.bad(command, b"unknown command")


class Gmail(Server):
    """Shows a message in a folder for each of its labels, and all but Trash and Spam once more in All Mail.

    As Google's "IMAP extensions" and "Special-use extension of the LIST command" describe it. ``post`` is how a
    message comes, under a number of its own.
    """

    capabilities = b"IMAP4rev1 AUTH=PLAIN NAMESPACE UIDPLUS ID X-GM-EXT-1 SPECIAL-USE"
    greeting = b"* OK Gimap ready for requests\r\n"
    ALL, STARRED, IMPORTANT = b"[Gmail]/All Mail", b"[Gmail]/Starred", b"[Gmail]/Important"

    def __init__(self, folders: list[Folder] | None = None, users: dict[str, str] | None = None) -> None:
        standard = [
            Folder(b"INBOX"),
            Folder(b"[Gmail]", attributes=b"\\HasChildren \\Noselect"),
            Folder(self.ALL, attributes=b"\\All \\HasNoChildren", uidvalidity=11),
            Folder(self.STARRED, attributes=b"\\Flagged \\HasNoChildren", uidvalidity=12),
            Folder(self.IMPORTANT, attributes=b"\\HasNoChildren \\Important", uidvalidity=13),
            Folder(b"[Gmail]/Sent Mail", attributes=b"\\HasNoChildren \\Sent", uidvalidity=14),
            Folder(b"[Gmail]/Spam", attributes=b"\\HasNoChildren \\Junk", uidvalidity=15),
            Folder(b"Work", attributes=b"\\HasNoChildren", uidvalidity=16),
        ]
        self._numbers = iter(range(1 << 60, 1 << 61))
        super().__init__([*standard, *(folders or [])], users)

    def post(self, name: str, *labels: bytes, flags: bytes = b"") -> int:
        """A message with these labels, each the name of a folder; its number."""
        number = next(self._numbers)
        hidden = any(label == b"[Gmail]/Spam" for label in labels)
        for label in (*labels, *(() if hidden else (self.ALL,))):
            self.put(label, Mail(0, mail(name), flags, message_id=number))
        return number

    def put(self, label: bytes, message: Mail) -> None:
        """Show a message in a folder, under the next UID there."""
        folder = self.folder(label)
        if folder is None:
            raise ValueError(label)
        folder.mails.append(Mail(folder.uidnext, message.body, message.flags, message_id=message.message_id))
        folder.least_next = folder.uidnext

    def unlabel(self, number: int, label: bytes) -> None:
        """Take a message out of a folder; it stays in All Mail."""
        folder = self.folder(label)
        if folder is not None:
            folder.mails = [each for each in folder.mails if each.message_id != number]

    def on_append(self, session: Session, command: Command) -> None:
        name = command.words[0]
        number = next(self._numbers)
        for label in {name, self.ALL}:
            self.put(label, Mail(0, command.words[-1], message_id=number))
        session.ok(command)

    def on_other(self, session: Session, command: Command) -> None:
        if command.verb == b"ID":
            session.say(b'* ID ("name" "GImap" "vendor" "Google, Inc.")')
            session.ok(command)
        else:
            super().on_other(session, command)


class Exchange(Server):
    """Lists calendars and the like as folders, in one language or another, as some versions do."""

    capabilities = b"IMAP4 IMAP4rev1 AUTH=PLAIN IDLE NAMESPACE LITERAL+ UIDPLUS"
    greeting = b"* OK The Microsoft Exchange IMAP4 service is ready.\r\n"


class Session:
    """One client. ``given`` counts the bodies that it got; ``notes`` is for scripts."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server = server
        self.socket = connection
        self.folder: Folder | None = None
        self.given = 0
        self.notes: set[str] = set()
        self._file = connection.makefile("rb")

    def say(self, line: bytes) -> None:
        self.socket.sendall(line + b"\r\n")

    def raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ok(self, command: Command, text: bytes = b"done") -> None:
        self.say(b"%s OK %s" % (command.tag, text))

    def no(self, command: Command, text: bytes) -> None:
        self.say(b"%s NO %s" % (command.tag, text))

    def bad(self, command: Command, text: bytes) -> None:
        self.say(b"%s BAD %s" % (command.tag, text))

    def drip(self, data: bytes, pause: float, step: int = 1) -> None:
        """Send so many bytes at a time, with pauses (seconds), until the server stops."""
        for start in range(0, len(data), step):
            if self.server.stopped.wait(pause):
                raise Over
            self.socket.sendall(data[start : start + step])

    def stall(self, seconds: float = 3600) -> None:
        """Say nothing, and end the session after it."""
        self.server.stopped.wait(seconds)
        raise Over

    def pause(self, seconds: float) -> None:
        if self.server.stopped.wait(seconds):
            raise Over

    def reset(self) -> None:
        """End the session with a reset; what is under way may be lost."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()
        raise Over

    def end(self) -> None:
        raise Over

    def shut(self) -> None:
        """End it, whatever its thread does."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    # Reading -----------------------------------------------------------------------

    def run(self) -> None:
        if self.server.implicit_tls:
            self._start_tls()
        self.raw(self.server.greeting)
        while (command := self._command()) is not None:
            self._answer(command)

    def _start_tls(self) -> None:
        if self.server.certificate is None:
            raise Over
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server.certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self._file = self.socket.makefile("rb")

    def line(self) -> bytes:
        """The next line of the client."""
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise Over
        return line.rstrip(b"\r\n")

    def _command(self) -> Command | None:
        text = self.line()
        tag, _, rest = text.partition(b" ")
        verb, _, rest = rest.partition(b" ")
        words: list[bytes] = []
        said = rest
        while True:
            literal = self._words(rest, words)
            if literal is None:
                return Command(tag, verb.upper(), words, said)
            size, waits = literal
            if waits:
                self.raw(b"+ go on\r\n")
            words.append(self._file.read(size))
            rest = self.line()

    @staticmethod
    def _words(text: bytes, words: list[bytes]) -> tuple[int, bool] | None:
        """Take a line apart; the literal that it ends in: its size, and whether the client waits."""
        rest = iter(text.decode("latin-1"))
        word, inside, quoted = "", False, False
        for each in rest:
            if inside:
                if each == "\\":
                    word += next(rest, "")
                elif each == '"':
                    inside = False
                else:
                    word += each
            elif each == '"':
                inside = quoted = True
            elif each == " ":
                if word or quoted:
                    words.append(word.encode("latin-1"))
                word, quoted = "", False
            else:
                word += each
        if not quoted and word.startswith("{") and word.endswith("}"):
            return int(word.strip("{+}")), not word.endswith("+}")
        if word or quoted:
            words.append(word.encode("latin-1"))
        return None

    def _answer(self, command: Command) -> None:  # noqa: PLR0912 (a table)
        server, verb, words = self.server, command.verb, command.words
        server.log.append(verb if verb in {b"LOGIN", b"AUTHENTICATE"} else b"%s %s" % (verb, command.text))
        match verb:
            case b"CAPABILITY":
                self.say(b"* CAPABILITY " + server.capabilities)
                self.ok(command)
            case b"NOOP":
                self.ok(command)
            case b"LOGOUT":
                self.say(b"* BYE until later")
                self.server.count_out(self)  # before the client is told, who may come again at once
                self.ok(command)
                raise Over
            case b"STARTTLS":
                self.ok(command)
                self._start_tls()
            case b"LOGIN":
                self.log_in(command, words[0], words[1])
            case b"AUTHENTICATE":
                server.on_authenticate(self, command)
            case b"LIST":
                server.on_list(self, command)
            case b"LSUB":
                server.on_lsub(self, command)
            case b"NAMESPACE":
                server.on_namespace(self, command)
            case b"STATUS":
                server.on_status(self, command)
            case b"SELECT" | b"EXAMINE":
                server.on_open(self, command)
            case b"APPEND":
                server.on_append(self, command)
            case b"UID" | b"FETCH" | b"SEARCH":
                self._about_messages(command)
            case _:
                server.on_other(self, command)

    def log_in(self, command: Command, user: bytes, password: bytes) -> None:
        """Answer a login."""
        refused = self.server.refuses_login(self, user, password)
        if refused is not None:
            self.say(b"%s %s" % (command.tag, refused))
        elif self.server.login_code:
            self.ok(command, b"[CAPABILITY %s] welcome" % self.server.capabilities)
        else:
            self.ok(command, b"welcome")

    def _about_messages(self, command: Command) -> None:
        by_uid = command.verb == b"UID"
        verb, *words = [command.words[0].upper(), *command.words[1:]] if by_uid else [command.verb, *command.words]
        if verb == b"SEARCH":
            self.server.on_search(self, command, by_uid=by_uid)
        elif verb != b"FETCH":
            self.server.on_other(self, command)
        elif self.folder is None:
            self.bad(command, b"no folder is open")
        else:
            mails = list(self._named(words[0], self.folder.mails, by_uid=by_uid))
            names = [each.strip(b"()").upper() for each in words[1:]]
            self.server.on_fetch(self, command, mails, [each for each in names if each not in {b"RECEIVED", b"DATE"}])

    @staticmethod
    def _named(text: bytes, mails: list[Mail], *, by_uid: bool) -> Iterator[tuple[int, Mail]]:
        """The messages of a sequence set, with their numbers."""
        top = max((each.uid for each in mails), default=0) if by_uid else len(mails)
        ranges = []
        for part in text.split(b","):
            first, _, last = part.partition(b":")
            ends = [top if each == b"*" else int(each) for each in (first, last or first)]
            ranges.append((min(ends), max(ends)))
        for number, each in enumerate(mails, 1):
            if any(first <= (each.uid if by_uid else number) <= last for first, last in ranges):
                yield number, each
