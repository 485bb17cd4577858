"""POP3 UIDLs: what a POP3 client knows its messages by (RFC 1939 section 7).

A POP3 server gives the messages of INBOX in the order of their UIDs. So the
two listings are laid side by side; the sizes tell whether that is right.
"""

from __future__ import annotations

import poplib
from collections.abc import Sequence

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import BasculeError, LegacyUnavailable
from bascule.legacy import LegacySettings, Service, Trust, plainly

NEW = 20  # messages by which the two listings may differ at their ends


class UidlsNotKnown(BasculeError):
    """The POP3 listing cannot be laid beside the IMAP one."""


def uidls(
    legacy: LegacySettings,
    service: Service,
    trust: Trust,
    address: Address,
    password: Password,
    inbox: Sequence[tuple[int, int]],
) -> dict[int, str]:
    """The UIDL of each message of INBOX by UID; ``inbox`` is its UIDs and sizes
    in bytes, in order; 0 where it is not known.

    Raises:
        UidlsNotKnown, LegacyUnavailable
    """
    host, port = legacy.imap_host, service.port
    try:
        if service.tls == "implicit":
            session: poplib.POP3 = poplib.POP3_SSL(host, port, timeout=trust.timeout, context=trust.context())
        else:
            session = poplib.POP3(host, port, timeout=trust.timeout)
        try:
            if service.tls == "starttls":
                session.stls(context=trust.context())
            session.user(legacy.login_name(address))
            session.pass_(password.secret)
            sizes = [tuple(map(int, line.split()[:2])) for line in session.list()[1]]
            names = dict(line.decode("ascii").split(None, 1) for line in session.uidl()[1])
            session.rset()
            session.quit()
        finally:
            session.close()
    except poplib.error_proto as error:
        raise UidlsNotKnown(f"the POP3 server refuses: {error}") from None
    except (OSError, ValueError) as error:
        raise LegacyUnavailable(f"POP3: {plainly(error, host, port)}") from error
    # The last ones may have come or gone between the two listings; they are few and new to the client.
    pairs = list(zip(inbox, sizes, strict=False))
    odd = [uid for (uid, size), (_, octets) in pairs if size not in {0, octets}]
    if odd or abs(len(inbox) - len(sizes)) > NEW:
        raise UidlsNotKnown(
            f"POP3 lists {len(sizes)} messages and IMAP {len(inbox)}, {len(odd)} of them of other sizes"
        )
    found = {uid: names.get(str(number), "").strip() for (uid, _), (number, _) in pairs}
    return {uid: name for uid, name in found.items() if _is_storable(name)}


def _is_storable(uidl: str) -> bool:
    return bool(uidl) and all("!" <= letter <= "~" for letter in uidl)
