"""Which folders come along: rules are refused where they make no sense, and what is left out is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from bascule.database import Connection, value
from bascule.lab.postgres import Postgres
from bascule.migrator.acts import Acts

RULES = "SELECT kind, folder, action, name_here, special_use_here FROM folder_rules ORDER BY 1, 2"


def add(connection: Connection, *rule: object, domain: str = "lab.test") -> None:
    connection.execute(f"SELECT bascule.add_folder_rule(%s{', %s' * len(rule)})".encode(), (domain, *rule))


@pytest.fixture
def admin(postgres: Postgres, owner: Connection) -> Any:
    _ = owner  # the database is empty but for what is made there
    with psycopg.connect(postgres.dsn("bascule_admin"), autocommit=True) as connection:
        connection.execute("SET search_path = bascule")
        yield connection


def test_rules_are_kept_and_are_in_the_journal(owner: Connection, admin: Connection) -> None:
    add(admin, "name", "Old", "leave-out")
    add(admin, "pattern", "Public/*", "copy", "Was/*", None)
    add(admin, "special-use", "\\jUnk", "leave-out")
    add(admin, "name", "Sent Items", "copy", "", "\\SENT")
    add(admin, "exchange-items", None, "leave-out")
    add(admin, "common-names", "", "copy")
    add(admin, "special-use", "\\All", "once", "Archive", "\\Archive")
    assert admin.execute(RULES).fetchall() == [
        ("common-names", "", "copy", "", ""),
        ("exchange-items", "", "leave-out", "", ""),
        ("name", "Old", "leave-out", "", ""),
        ("name", "Sent Items", "copy", "", "\\Sent"),
        ("pattern", "Public/*", "copy", "Was/*", ""),
        ("special-use", "\\All", "once", "Archive", "\\Archive"),
        ("special-use", "\\Junk", "leave-out", "", ""),
    ]
    said = [
        reason for (reason,) in owner.execute("SELECT reason FROM events WHERE event = 'folder rule added' ORDER BY id")
    ]
    assert said[:2] == ["name Old: leave-out", "pattern Public/*: copy as Was/*"]
    admin.execute("SELECT remove_folder_rule('lab.test', 'special-use', '\\junk')")
    admin.execute("SELECT remove_folder_rule('lab.test', 'exchange-items')")
    admin.execute("SELECT remove_folder_rule('LAB.test', 'name', 'Old')")
    assert len(admin.execute(RULES).fetchall()) == 4
    assert value(owner, "SELECT count(*) FROM events WHERE event = 'folder rule removed'") == 3


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("kind", "x", "leave-out"), "is known by name, pattern"),
        ((None, "x", "leave-out"), "not by nothing"),
        (("name", "x", "drop"), "leave-out, copy or once, not 'drop'"),
        (("name", "x", None), "not nothing"),
        (("name", "", "leave-out"), "needs to say which"),
        (("name", None, "leave-out"), "needs to say which"),
        (("exchange-items", "Calendar", "leave-out"), "names none"),
        (("exchange-items", "", "copy"), "come along without a rule"),
        (("common-names", "", "leave-out"), "only says as what"),
        (("common-names", "", "copy", "Sent"), "only says as what"),
        (("name", "Inbox", "leave-out"), "INBOX always comes along"),
        (("name", "a\nb", "leave-out"), "no control characters"),
        (("name", "a", "copy", "b\x1b"), "no control characters"),
        (("name", "a" * 401, "leave-out"), "at most 400"),
        (("pattern", "Public/", "leave-out"), "has no \\* in it"),
        (("special-use", "Junk", "leave-out"), "is no special use"),
        (("special-use", "\\Noselect", "leave-out"), "is no special use"),
        (("name", "a", "copy", "", "\\All"), "no folder can be shown here as"),
        (("name", "a", "leave-out", "b"), "left out has no name"),
        (("name", "a", "leave-out", "", "\\Sent"), "left out has no name"),
        (("pattern", "a*", "copy", "", "\\Sent"), "not all that fit a pattern"),
        (("pattern", "a*", "once"), "not all that fit a pattern"),
        (("name", "a", "copy", "inbox"), "place of INBOX"),
        (("pattern", "a*", "copy", "b"), "need one \\* each"),
        (("pattern", "a*c*", "copy", "b*"), "need one \\* each"),
        (("name", "other", "copy", "New"), "another folder is called 'New' here already"),
        (("name", "is there", "leave-out"), "has a rule for name is there already"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    admin: Connection, rule: tuple[object, ...], words: str
) -> None:
    add(admin, "name", "is there", "copy", "New")
    with pytest.raises(psycopg.Error, match=words) as refused:
        add(admin, *rule)
    assert (refused.value.sqlstate or "").startswith("BA")
    assert admin.execute(RULES).fetchall() == [("name", "is there", "copy", "New", "")]


def test_unknown_domains_and_rules_are_named(admin: Connection) -> None:
    with pytest.raises(psycopg.Error, match=r"no domain nowhere\.test is known"):
        add(admin, "name", "x", "leave-out", domain="nowhere.test")
    with pytest.raises(psycopg.Error, match="has no rule for name x"):
        admin.execute("SELECT remove_folder_rule('lab.test', 'name', 'x')")


def test_rules_go_with_their_domain(owner: Connection, admin: Connection) -> None:
    owner.execute(
        "INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port) "
        "VALUES ('brief.test', 'local', 'imap.old.test', 993, 'implicit', 'mx.old.test', 25)"
    )
    add(admin, "name", "x", "leave-out", domain="brief.test")
    admin.execute("SELECT remove_domain('brief.test')")
    assert value(owner, "SELECT count(*) FROM folder_rule") == 0


def test_no_part_but_the_administrators_makes_rules(postgres: Postgres, admin: Connection) -> None:
    _ = admin
    for part in ("worker", "portal", "authenticator", "policy_daemon", "dovecot"):
        with (
            psycopg.connect(postgres.dsn(f"bascule_{part}"), autocommit=True) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            add(connection, "name", "x", "leave-out")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        admin.execute("SELECT set_left_out(1, '[]', true)")


def test_what_is_left_out_is_seen_and_is_at_last_what_the_flip_says(
    postgres: Postgres, owner: Connection, admin: Connection, acknowledge: Callable[[int, int], None]
) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    mailbox_id = value(owner, "SELECT id FROM mailbox")
    add(admin, "name", "Junk", "leave-out")
    with psycopg.connect(postgres.dsn("bascule_worker"), autocommit=True) as connection:
        acts = Acts(connection)
        account = acts.account(mailbox_id)
        assert account is not None
        (rule,) = acts.folder_rules(account.domain_id)
        acts.set_left_out(
            mailbox_id,
            [
                {"name": "Junk", "reason": str(rule), "messages": 12},
                {"name": "B&APY-d", "reason": "x\0", "messages": None},
            ],
            complete=True,
        )
        seen = "SELECT address, folder, messages, reason, state FROM bascule.left_out ORDER BY 2"
        assert admin.execute(seen.encode()).fetchall() == [
            ("alice@lab.test", "B&APY-d", None, "x\\x00", "requested"),
            ("alice@lab.test", "Junk", 12, "the rule for the name 'Junk'", "requested"),
        ]
        # A folder made since, of which nobody counts the messages, forgets nothing.
        acts.set_left_out(mailbox_id, [{"name": "Junk", "reason": "again", "messages": None}], complete=False)
        assert acts.left_out_folders(mailbox_id) == {"Junk", "B&APY-d"}
        assert admin.execute(seen.encode()).fetchall()[1][2] == 12
        report = {
            "folders": [],
            "left_out": [{"name": "Junk", "reason": "the rule", "messages": 13}],
            "folder_rules": [rule.as_json()],
            "once": "All",
        }
        acts.begin_copy(mailbox_id)
        epoch = acts.begin_cutover(mailbox_id)
        acknowledge(mailbox_id, epoch)
        acts.finish_cutover(mailbox_id, epoch, "{ARGON2ID}x", report)
        assert acts.rules_at_flip(mailbox_id) == [rule]
        assert acts.once_at_flip(mailbox_id) == "All"
        assert acts.left_out_folders(mailbox_id) == {"Junk"}
        # Whoever moved keeps what held then.
        admin.execute("SELECT remove_folder_rule('lab.test', 'name', 'Junk')")
        assert acts.rules_at_flip(mailbox_id) == [rule]
    assert value(admin, "SELECT left_out FROM verifications") == [
        {"name": "Junk", "reason": "the rule", "messages": 13}
    ]


def test_a_report_of_a_former_version_says_nothing_of_folders(
    postgres: Postgres, owner: Connection, acknowledge: Callable[[int, int], None]
) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    mailbox_id = value(owner, "SELECT id FROM mailbox")
    owner.execute("SELECT begin_copy(%s)", (mailbox_id,))
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox_id)
    acknowledge(mailbox_id, epoch)
    report = json.dumps({"folders": [], "special_uses": {}})
    owner.execute("SELECT finish_cutover(%s, %s, '{ARGON2ID}x', %s)", (mailbox_id, epoch, report))
    with psycopg.connect(postgres.dsn("bascule_worker"), autocommit=True) as connection:
        acts = Acts(connection)
        assert (acts.rules_at_flip(mailbox_id), acts.once_at_flip(mailbox_id)) == ([], "")
        assert acts.left_out_folders(mailbox_id) == frozenset()
