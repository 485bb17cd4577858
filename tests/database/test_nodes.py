"""Who must have put a hold into force before a mailbox flips, and who may say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from bascule.database import Connection, value
from bascule.hooks.deputy import GOOD
from bascule.lab.postgres import Postgres

FLIP = "SELECT finish_cutover(%s, %s, '{ARGON2ID}x', '{\"folders\": []}')"
Acknowledge = Callable[[int, int], None]


@contextmanager
def role(postgres: Postgres, name: str) -> Iterator[Connection]:
    with psycopg.connect(postgres.dsn(name), autocommit=True) as connection:
        yield connection


def copying(owner: Connection) -> int:
    mailbox = int(value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')"))
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    return mailbox


def waiting(owner: Connection, mailbox: int, epoch: int) -> list[str]:
    rows = owner.execute("SELECT part || ' ' || node FROM unacknowledged(%s, %s) ORDER BY 1", (mailbox, epoch))
    return [row[0] for row in rows.fetchall()]


def stand_still(owner: Connection, seconds: int = 16, name: str = "%") -> None:
    """As if no heartbeat had come for so long: the clock was put forward, the database was away, a host is down."""
    owner.execute(
        "UPDATE node SET heartbeat_at = clock_timestamp() - make_interval(secs => %s) WHERE name LIKE %s",
        (seconds, name),
    )


def test_everybody_is_waited_for(owner: Connection, acknowledge: Acknowledge) -> None:
    owner.execute("SELECT beat('mx2', 'policy_daemon')")
    mailbox = copying(owner)
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    assert waiting(owner, mailbox, epoch) == ["authenticator store", "policy_daemon mx", "policy_daemon mx2"]
    acknowledge(mailbox, epoch - 1)
    assert len(waiting(owner, mailbox, epoch)) == 3
    acknowledge(mailbox, epoch)
    assert waiting(owner, mailbox, epoch) == ["policy_daemon mx2"]
    with pytest.raises(psycopg.Error, match="not acknowledged by: policy_daemon on mx2") as refused:
        owner.execute(FLIP.encode(), (mailbox, epoch))
    assert refused.value.sqlstate == "BA002"
    assert "bascule node forget HOST PART" in (refused.value.diag.message_hint or "")
    assert value(owner, "SELECT state FROM mailbox") == "cutover"
    owner.execute("SELECT acknowledge(%s, 'mx2', 'policy_daemon', %s)", (mailbox, epoch))
    owner.execute(FLIP.encode(), (mailbox, epoch))
    assert value(owner, "SELECT state FROM mailbox") == "local"


def test_a_database_that_stood_still_flips_nothing(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = copying(owner)
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    stand_still(owner)
    assert waiting(owner, mailbox, epoch) == ["authenticator store", "policy_daemon mx"]
    with pytest.raises(psycopg.Error, match="not acknowledged by"):
        owner.execute(FLIP.encode(), (mailbox, epoch))
    acknowledge(mailbox, epoch)  # they are back
    owner.execute(FLIP.encode(), (mailbox, epoch))


def test_a_return_is_guarded_as_a_cutover_is(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = copying(owner)
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute(FLIP.encode(), (mailbox, epoch))
    owner.execute("SELECT return_mailbox('alice@lab.test', 'why')")
    stand_still(owner)
    with pytest.raises(psycopg.Error, match="there is no sign of life of"):
        owner.execute("SELECT begin_return(%s)", (mailbox,))
    owner.execute("SELECT beat('mx', 'policy_daemon'), beat('store', 'authenticator')")
    epoch = value(owner, "SELECT begin_return(%s)", mailbox)
    stand_still(owner)
    with pytest.raises(psycopg.Error, match="not acknowledged by"):
        owner.execute("SELECT finish_return(%s, %s)", (mailbox, epoch))
    acknowledge(mailbox, epoch)
    owner.execute("SELECT finish_return(%s, %s)", (mailbox, epoch))
    assert value(owner, "SELECT state FROM mailbox") == "legacy"


@pytest.mark.parametrize("part", ["policy_daemon", "authenticator"])
def test_the_only_node_of_a_part_that_signs_off_is_no_consent(owner: Connection, part: str) -> None:
    mailbox = copying(owner)
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    for node, other in (("mx", "policy_daemon"), ("store", "authenticator")):
        if other == part:
            owner.execute("SELECT sign_off(%s, %s)", (node, part))
        else:
            owner.execute("SELECT acknowledge(%s, %s, %s, %s)", (mailbox, node, other, epoch))
    assert len(waiting(owner, mailbox, epoch)) == 1
    with pytest.raises(psycopg.Error, match=f"not acknowledged by: {part} on"):
        owner.execute(FLIP.encode(), (mailbox, epoch))


def test_an_mx_that_signs_off_is_not_waited_for_if_there_is_another(
    owner: Connection, acknowledge: Acknowledge
) -> None:
    owner.execute("SELECT beat('mx2', 'policy_daemon')")
    mailbox = copying(owner)
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute("SELECT sign_off('mx2', 'policy_daemon')")
    owner.execute(FLIP.encode(), (mailbox, epoch))


def test_a_store_that_signs_off_is_waited_for(owner: Connection, acknowledge: Acknowledge) -> None:
    """Its Dovecot may go on proxying a session to the legacy server."""
    owner.execute("SELECT beat('store2', 'authenticator')")
    mailbox = copying(owner)
    owner.execute("SELECT sign_off('store2', 'authenticator')")
    with pytest.raises(psycopg.Error, match="no sign of life of authenticator on store2 since"):
        owner.execute("SELECT begin_cutover(%s)", (mailbox,))
    owner.execute("SELECT beat('store2', 'authenticator')")
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    owner.execute("SELECT sign_off('store2', 'authenticator')")
    acknowledge(mailbox, epoch)
    assert waiting(owner, mailbox, epoch) == ["authenticator store2"]
    owner.execute("SELECT beat('store2', 'authenticator')")
    owner.execute("SELECT acknowledge(%s, 'store2', 'authenticator', %s)", (mailbox, epoch))
    owner.execute(FLIP.encode(), (mailbox, epoch))


def test_no_mail_is_held_for_a_flip_that_cannot_come(owner: Connection) -> None:
    mailbox = copying(owner)
    stand_still(owner, name="mx")
    with pytest.raises(psycopg.Error, match="no sign of life of policy_daemon on mx since") as refused:
        owner.execute("SELECT begin_cutover(%s)", (mailbox,))
    assert "bascule node forget HOST PART" in (refused.value.diag.message_hint or "")
    owner.execute("DELETE FROM node WHERE name = 'mx'")
    with pytest.raises(psycopg.Error, match="no sign of life of policy_daemon on any host"):
        owner.execute("SELECT begin_cutover(%s)", (mailbox,))
    assert value(owner, "SELECT state FROM mailbox") == "copying"


def test_an_authenticator_is_not_forgotten_while_its_dovecot_may_go_on(postgres: Postgres, owner: Connection) -> None:
    """By what it left; unless somebody makes sure that it does not."""
    forget = "SELECT bascule.forget_node('store', 'authenticator', 'it''s burnt'{})"
    with role(postgres, "bascule_admin") as admin:
        for seconds in (16, int(GOOD) - 60):
            stand_still(owner, seconds)
            with pytest.raises(psycopg.Error, match="Dovecot on store may go on with logins until 2") as refused:
                admin.execute(forget.format("").encode())
            assert refused.value.sqlstate == "BA002"
            advice = refused.value.diag.message_hint or ""
            assert "Stop Dovecot there" in advice
            assert "bascule node forget store authenticator" in advice
        admin.execute(forget.format(", serves_nobody => true").encode())
        owner.execute("SELECT beat('store', 'authenticator')")
        stand_still(owner, int(GOOD) + 1)
        admin.execute(forget.format("").encode())
        told = admin.execute("SELECT reason FROM bascule.events WHERE event = 'node forgotten'").fetchall()
    assert told == [("authenticator on store: it's burnt",)] * 2


def test_a_node_that_is_gone_for_good_is_forgotten(
    postgres: Postgres, owner: Connection, acknowledge: Acknowledge
) -> None:
    owner.execute("SELECT beat('mx2', 'policy_daemon')")
    mailbox = copying(owner)
    with role(postgres, "bascule_admin") as admin:
        forget = "SELECT bascule.forget_node('mx2', 'policy_daemon', %s)"
        with pytest.raises(psycopg.Error, match="policy_daemon on mx2 is alive"):
            admin.execute(forget.encode(), ("burnt",))
        stand_still(owner, name="mx2")
        with pytest.raises(psycopg.Error, match="say why policy_daemon on mx2 is not to be waited for"):
            admin.execute(forget.encode(), (" ",))
        admin.execute(forget.encode(), ("burnt",))
        with pytest.raises(psycopg.Error, match="no policy_daemon on mx2 is known"):
            admin.execute(forget.encode(), ("burnt",))
        told = admin.execute("SELECT actor, reason FROM bascule.events WHERE event = 'node forgotten'").fetchall()
    assert told == [("bascule_admin", "policy_daemon on mx2: burnt")]
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute(FLIP.encode(), (mailbox, epoch))


# Who may say so -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        "SELECT bascule.beat('ghost', '{part}')",
        "SELECT bascule.sign_off('{node}', '{part}')",
        "SELECT bascule.acknowledge(1, '{node}', '{part}', 3)",
    ],
)
@pytest.mark.parametrize("mine", ["policy_daemon", "authenticator"])
def test_a_part_speaks_for_itself_only(postgres: Postgres, owner: Connection, mine: str, act: str) -> None:
    mailbox = copying(owner)
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    other = {"policy_daemon": ("store", "authenticator"), "authenticator": ("mx", "policy_daemon")}[mine]
    before = owner.execute("SELECT * FROM node ORDER BY 1").fetchall()
    with role(postgres, f"bascule_{mine}") as taken, pytest.raises(psycopg.errors.InsufficientPrivilege):
        taken.execute(act.format(node=other[0], part=other[1]).encode())
    assert owner.execute("SELECT * FROM node ORDER BY 1").fetchall() == before
    assert len(waiting(owner, mailbox, epoch)) == 2


def test_a_host_speaks_for_its_own_name_only(postgres: Postgres, owner: Connection) -> None:
    """Two hosts that the database can tell apart: one comes by the socket, one by TCP."""
    mailbox = copying(owner)
    with (
        role(postgres, "bascule_policy_daemon") as here,
        psycopg.connect(postgres.tcp_dsn("bascule_policy_daemon"), autocommit=True) as there,
    ):
        here.execute("SELECT bascule.beat('mx', 'policy_daemon')")
        there.execute("SELECT bascule.beat('mx2', 'policy_daemon')")
        epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
        for act in (
            "SELECT bascule.beat('mx2', 'policy_daemon')",
            "SELECT bascule.sign_off('mx2', 'policy_daemon')",
            f"SELECT bascule.acknowledge({mailbox}, 'mx2', 'policy_daemon', {epoch})",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="does not speak for policy_daemon on mx2"):
                here.execute(act.encode())
        here.execute("SELECT bascule.acknowledge(%s, 'mx', 'policy_daemon', %s)", (mailbox, epoch))
        assert waiting(owner, mailbox, epoch) == ["authenticator store", "policy_daemon mx2"]
        # Its address may change: when it is silent, another takes its place, and the journal says so.
        stand_still(owner, name="mx2")
        here.execute("SELECT bascule.beat('mx2', 'policy_daemon')")
    reason = value(owner, "SELECT reason FROM events WHERE event = 'node moved'")
    assert reason == (
        "policy_daemon on mx2: bascule_policy_daemon at the database host, before bascule_policy_daemon at 127.0.0.1"
    )


def test_nobody_acknowledges_what_has_not_happened(owner: Connection) -> None:
    mailbox = copying(owner)
    owner.execute("SELECT acknowledge(%s, 'mx', 'policy_daemon', 1000)", (mailbox,))
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    assert waiting(owner, mailbox, epoch) == ["authenticator store", "policy_daemon mx"]
