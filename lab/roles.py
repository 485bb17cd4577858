"""The Ansible roles, tried on hosts booted from Debian 12 and 13, with the whole story on each.

``fresh-trixie``: one host from nothing, without more ado; ``build-bookworm`` and
``build-trixie``: one host from nothing with the former version of bascule,
upgraded while mail comes in, and whatever an administrator does later;
``plug-bookworm`` and ``plug-trixie``: into a Postfix and a Dovecot that somebody
runs already, and out again; ``system-bookworm`` and ``system-trixie``: the same
where users are the system's own; ``mariadb-bookworm``: where they are in MariaDB;
``filtered-bookworm``: where mail passes postscreen and a content filter, and folders
begin with INBOX.; ``several``: database, two MX, a store and the page, each on a host of its own.
"""

from __future__ import annotations

import json
import re
import smtplib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from bascule import schema
from bascule.lab.hosts import Hosts
from bascule.lab.machines import Machine, own_control_groups
from bascule.lab.mail import Traffic, send
from bascule.lab.operators import OPERATORS, OWN, PASSWORD, Operator
from bascule.lab.process import LabError, run
from bascule.lab.sites import DOMAIN, eventually

#: Configuration that plug may touch, and unplug must restore.
CONFIGURATION = ("/etc/postfix", "/etc/dovecot", "/etc/postgresql", "/etc/nginx", "/etc/apache2")
#: The operator's, of which neither owner nor mode may change; what is in it is mail.
MAIL = ("/var/vmail", "/var/mail", "/var/mail/*", "/home", "/home/*")
ONE_HOST = {group: ["mail"] for group in ("database", "mx", "store", "portal")}
#: Seconds that Postfix waits for a socketmap.
SOCKETMAP_PATIENCE = 100.0
#: What a later version of bascule changes in its schema.
ADD_COLUMN = "ALTER TABLE bascule.mailbox ADD COLUMN lab_note text NOT NULL DEFAULT 'as it was'"
#: Each scenario has its own of everything, which ends with its program, and with it whatever that started.
NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup"),
    *("--propagation", "private"),
)


def fresh(hosts: Hosts, *, release: str) -> None:
    """One host from nothing, and the whole story."""
    hosts.start({"mail": release})
    mail = hosts.machines["mail"]
    inventory = hosts.inventory(ONE_HOST, hosts.wheel())
    hosts.play("build", inventory)
    hosts.insist_unchanged(hosts.play("build", inventory))
    hosts.testinfra(ONE_HOST)
    hosts.prepare(mail, "local unix:bascule/lmtp")
    with Traffic(25, hosts.legacy.users, hosts.ledger, host=mail.address):
        two_move(hosts, mail)
        hosts.goes_back_and_moves_again(mail, mail, "bob")
        hosts.close(mail)
    ends(hosts, mail)


def two_move(hosts: Hosts, machine: Machine, *, page: Machine | None = None, store: Machine | None = None) -> None:
    """alice asks at the URL, bob merely logs in; ``machine`` is all that another one is not."""
    hosts.ask_at_the_url(page or machine, "alice")
    with hosts.client(store or machine, f"bob@{DOMAIN}", hosts.legacy.users["bob"]) as bob:
        hosts.insist(bob.folder_exists("INBOX"), "bob is logged in, proxied")
    hosts.until_moved(machine, "alice")
    hosts.until_moved(machine, "bob")


def ends(hosts: Hosts, mail: Machine) -> None:
    """Nothing waits any more, and everything is there, once."""
    queue_empties(mail)
    hosts.count(mail)


def build(hosts: Hosts, *, release: str) -> None:
    """One host from nothing, with the former version; upgraded while mail comes in; and what comes later."""
    hosts.start({"mail": release})
    mail = hosts.machines["mail"]
    present = hosts.wheel()
    inventory = hosts.inventory(ONE_HOST, present)

    hosts.tell("check mode on a fresh host tells what would be done, and does nothing")
    before = mail.run("dpkg -l | sha256sum; ls /opt /etc")
    hosts.play("build", inventory, "--check", "--diff")
    hosts.insist(mail.run("dpkg -l | sha256sum; ls /opt /etc") == before, "check mode changes nothing")

    former = hosts.former_version()
    hosts.tell(f"built with the version before this one: {former.name}")
    hosts.play("build", hosts.inventory(ONE_HOST, hosts.wheel(former)), checkout=former)
    hosts.prepare(mail, "local unix:bascule/lmtp")
    with Traffic(25, hosts.legacy.users, hosts.ledger, host=mail.address) as traffic:
        two_move(hosts, mail)
        hosts.tell("upgraded to this version, while mail comes in")
        inventory = hosts.inventory(ONE_HOST, present)
        puts_nothing_off(hosts, traffic, lambda: hosts.play("build", inventory))
        hosts.insist_unchanged(hosts.play("build", inventory))
        hosts.testinfra(ONE_HOST)
        hosts.goes_back_and_moves_again(mail, mail, "bob")
        keeps_what_it_knows(hosts, inventory)
        changes_the_schema_or_nothing(hosts, inventory, present, traffic)
        rejects_what_does_not_start(hosts, inventory, present)
        hosts.close(mail)
    ends(hosts, mail)
    hosts.tell("what systemd thinks of the units")
    hosts.show(
        mail.run(
            "for part in policy-daemon milter authenticator worker portal; do "
            "systemd-analyze security --no-pager bascule-$part | tail -n 1; done"
        )
    )


def puts_nothing_off(hosts: Hosts, traffic: Traffic, act: Callable[[], object]) -> None:
    """Nobody who sends while something is done is told to come back later."""
    sent, put_off = traffic.sent, traffic.put_off
    act()
    hosts.tell(f"meanwhile {traffic.sent - sent} messages came; told to come back: {traffic.put_off - put_off}")
    hosts.insist(traffic.sent > sent and traffic.put_off == put_off, "no message is put off")


def keeps_what_it_knows(hosts: Hosts, inventory: Path) -> None:
    """A change of the key for sealing; a backup, and the database from it."""
    mail = hosts.machines["mail"]
    hosts.tell("the key for sealing is changed")
    public = mail.run("cat /etc/bascule/seal.pub")
    hosts.play("rotate", inventory)
    hosts.insist(mail.run("cat /etc/bascule/seal.pub") != public, "there is a new key")
    hosts.insist(mail.run("wc -l < /etc/bascule/seal.key").strip() == "1", "the former one is forgotten")
    hosts.insist_unchanged(hosts.play("build", inventory))

    hosts.tell("backup; the database is lost; restored")
    hosts.play("backup", inventory)
    rows = mail.run("bascule psql -Atc 'SELECT address, state FROM bascule.mailboxes ORDER BY 1'")
    mail.run("systemctl stop bascule-worker && runuser -u postgres -- dropdb --force bascule")
    hosts.play("restore", inventory)
    hosts.insist(
        mail.run("bascule psql -Atc 'SELECT address, state FROM bascule.mailboxes ORDER BY 1'") == rows,
        "all are again where they were",
    )


def changes_the_schema_or_nothing(hosts: Hosts, inventory: Path, present: Path, traffic: Traffic) -> None:
    """A later version changes a table while mail comes in, and the way back; one whose change fails changes nothing."""
    mail = hosts.machines["mail"]

    def columns() -> str:
        return mail.run(
            "bascule psql -Atc \"SELECT attname FROM pg_attribute WHERE attrelid = 'bascule.mailbox'::regclass "
            "AND attname ~ '^lab_'\""
        ).strip()

    hosts.tell("a version whose change of the schema fails half-way")
    running = mail.run("readlink /opt/bascule/current")
    failing = hosts.altered(present, "failing", partial(add_revision, statement=f"{ADD_COLUMN}; SELECT 1 / 0"))
    text = hosts.play("build", inventory, "--extra-vars", f"base__wheel={failing}", fails=True)
    hosts.insist_said(text, "It is as it was, and so is everything else", "division by zero")
    hosts.insist(columns() == "", "the schema is as it was")
    hosts.insist(mail.run("readlink /opt/bascule/current") == running, "the former version goes on")

    hosts.tell("a later version changes a table, while mail comes in")
    later = hosts.altered(present, "later", partial(add_revision, statement=ADD_COLUMN))
    puts_nothing_off(hosts, traffic, lambda: hosts.play("build", inventory, "--extra-vars", f"base__wheel={later}"))
    hosts.insist(columns() == "lab_note", "the table has changed")
    hosts.insist_current(mail)
    hosts.insist(mail.run("ls /var/backups/bascule"), "there is a copy of the database as it was")

    hosts.tell("back to this version, which leaves the table as it is")
    puts_nothing_off(hosts, traffic, lambda: hosts.play("build", inventory))
    hosts.insist(mail.run("readlink /opt/bascule/current") == running, "this version is the current one again")
    hosts.insist_current(mail)
    hosts.insist(columns() == "lab_note", "the table is as the later version made it")
    hosts.insist_unchanged(hosts.play("build", inventory))


def add_revision(files: Path, *, statement: str) -> None:
    """Put a change of the schema into a wheel's files."""
    (files / "bascule" / "schema" / "alembic" / "versions" / "lab.py").write_text(
        f"from alembic import op\n\nrevision = 'lab'\ndown_revision = {schema.head()!r}\n\n\n"
        f"def upgrade():\n    op.get_bind().connection.driver_connection.execute({statement!r})\n"
    )


def broken_milter(hosts: Hosts, present: Path) -> Path:
    """A version of which one program does not start."""

    def alter(files: Path) -> None:
        service = files / "bascule" / "milter" / "service.py"
        service.write_text(service.read_text().replace("def _run(", "def _run_not("))

    return hosts.altered(present, "bad", alter)


def rejects_what_does_not_start(hosts: Hosts, inventory: Path, present: Path) -> None:
    """What does not start is taken back, and the former version serves, with its settings."""
    mail = hosts.machines["mail"]
    hosts.tell("a version that does not start is taken back")
    bad = broken_milter(hosts, present)
    before = mail.run("readlink /opt/bascule/current; cat /etc/bascule/bascule.toml")
    text = hosts.play("build", inventory, "--extra-vars", f"base__wheel={bad}", fails=True)
    hosts.insist_said(text, "does not start here", "The former version serves again")
    hosts.insist("running" in mail.run("systemctl is-system-running || true"), "the former version serves")
    hosts.insist(mail.run("readlink /opt/bascule/current; cat /etc/bascule/bascule.toml") == before, "as before")
    hosts.insist_current(mail)
    hosts.insist_unchanged(hosts.play("build", inventory))


def plug(hosts: Hosts, *, operator: Operator) -> None:
    """Into a Postfix and Dovecot with settings of their own; out again, byte for byte."""
    hosts.start({"mail": operator.release}, operator.legacy)
    mail = hosts.machines["mail"]
    operator.create(mail)
    operator.works(mail)
    held: dict[str, object] = {}
    if operator.index:
        held["base__requirements"] = str(hosts.serve_packages(mail))
    wheel = hosts.wheel()

    def inventory_with(password: str) -> Path:
        probe = {"probe__recipient": OWN, "probe__password": password, "probe__user": operator.login}
        return hosts.inventory(ONE_HOST, wheel, operator.settings, **probe, **operator.variables, **held)

    inventory = inventory_with(PASSWORD)
    before = fingerprint(mail)

    refuses_what_is_not_read(hosts, inventory)
    hosts.tell("check mode shows what would be changed, and changes nothing")
    shown = hosts.play("plug", inventory, "--check", "--diff")
    hosts.insist_said(shown, "+++ after: /etc/dovecot/conf.d/", "+++ after: /etc/postfix/main.cf")
    hosts.show(
        "\n".join(
            line
            for line in shown.splitlines()
            if re.match(r"[+-](bascule_former|transport_maps|bascule-|.*socketmap)", line)
        )
    )
    hosts.insist(fingerprint(mail) == before, "check mode changes nothing")

    hosts.tell("a wrong password for the probe: nothing is begun")
    text = hosts.play("plug", inventory_with("wrong"), fails=True)
    hosts.insist(fingerprint(mail) == before, "nothing was changed")
    hosts.insist_said(text, "does not let")

    hosts.tell("plugged in, but Postfix may not reach a socket: mail does not come through, and all is taken back")
    fault = "etc/systemd/system/bascule-policy-daemon.socket.d/fault.conf"
    mail.write(fault, "[Socket]\nSocketMode=0600\n")
    text = hosts.play("plug", inventory_with(PASSWORD), fails=True)
    mail.run(f"rm /{fault} && systemctl daemon-reload")
    hosts.insist_said(text, "was not plugged in, and is configured as before", "does not take a message")
    hosts.insist(only(fingerprint(mail), "/etc/postfix") == only(before, "/etc/postfix"), "Postfix is as before")

    hosts.play("plug", inventory)
    hosts.insist_unchanged(hosts.play("plug", inventory))
    hosts.testinfra(ONE_HOST)
    hosts.show(mail.run("postconf -n | grep bascule; postfix check 2>&1"))
    waits_for_the_watchdog_only(hosts)
    hosts.prepare(mail, "local unix:bascule/lmtp")
    with Traffic(25, hosts.legacy.users, hosts.ledger, host=mail.address) as traffic:
        two_move(hosts, mail)
        hosts.sees_the_same_folders(mail, "alice", *filter(None, [operator.public]))
        hosts.goes_back_and_moves_again(mail, mail, "bob")
        stays_plugged_in(hosts, inventory, wheel, traffic)
        mail.run("echo from-the-shop | sendmail -f x@outside.test " + OWN)
        with hosts.client(mail, operator.login, PASSWORD) as anna:
            anna.select_folder("INBOX")
            eventually("the operator's own mail is delivered as before", lambda: anna.noop() and anna.search("ALL"))
        operator.works(mail)
        hosts.close(mail)
    ends(hosts, mail)
    restores_byte_for_byte(hosts, inventory, before, operator)


def waits_for_the_watchdog_only(hosts: Hosts) -> None:
    """Postfix gives a socketmap 100 seconds (dict_sockmap.c); systemd gives a silent policy daemon ten."""
    mail = hosts.machines["mail"]
    hosts.tell("the policy daemon hangs, and the operator has mail")
    mail.run("kill -STOP $(systemctl show --value --property MainPID bascule-policy-daemon)")
    began = time.monotonic()
    try:
        with smtplib.SMTP(mail.address, 25, timeout=120) as smtp:
            smtp.sendmail("x@outside.test", [OWN], "Subject: a part hangs\r\n\r\nNot for long.\r\n")
    except (OSError, smtplib.SMTPException) as error:
        raise LabError(f"the operator's own mail is not taken while the policy daemon hangs: {error!r}") from error
    took = time.monotonic() - began
    hosts.tell(f"it was taken after {took:.0f} s")
    hosts.insist(took < SOCKETMAP_PATIENCE / 2, "Postfix has its answer long before it gives up")


def refuses_what_is_not_read(hosts: Hosts, inventory: Path) -> None:
    """A dovecot.conf in one file, as PostfixAdmin's documentation has it: refused before anything else is done."""
    mail = hosts.machines["mail"]
    hosts.tell("a dovecot.conf that does not read conf.d is refused first of all, with the line to add")
    mail.run("sed -i.kept 's/^!include conf.d/#&/' /etc/dovecot/dovecot.conf")
    before, packages = fingerprint(mail), mail.run("dpkg -l; ls -A /opt /etc /var/lib")
    for options in (("--check",), ()):
        text = hosts.play("plug", inventory, *options, fails=True)
        hosts.insist_said(text, "!include_try conf.d/", "Nothing was changed")
        hosts.insist(fingerprint(mail) == before, "the configuration is as it was")
        hosts.insist(mail.run("dpkg -l; ls -A /opt /etc /var/lib") == packages, "nothing was installed")
    mail.run("mv /etc/dovecot/dovecot.conf.kept /etc/dovecot/dovecot.conf")
    hosts.tell("so is a main.cf that would refuse those who move")
    mail.run("cp -p /etc/postfix/main.cf /root/main.cf; postconf -e 'relay_recipient_maps = inline:{ a@b.test=x }'")
    text = hosts.play("plug", inventory, fails=True)
    hosts.insist_said(text, "relay_recipient_maps is inline:{ a@b.test=x }: it refuses", "Nothing was changed")
    hosts.insist(mail.run("dpkg -l; ls -A /opt /etc /var/lib") == packages, "nothing was installed")
    mail.run("cp -p /root/main.cf /etc/postfix/main.cf")


def stays_plugged_in(hosts: Hosts, inventory: Path, present: Path, traffic: Traffic) -> None:
    """While mail comes for a domain that moves, neither a failed upgrade nor an unplug leaves it without bascule."""
    mail = hosts.machines["mail"]
    before = fingerprint(mail)
    hosts.tell("an upgrade that fails leaves it plugged in, as it was; one part fails on the way back, too")
    running = mail.run("readlink /opt/bascule/current").strip()
    fault = "etc/systemd/system/bascule-worker.service.d/fault.conf"
    mail.write(fault, f"[Service]\nExecStartPre=/bin/sh -c '[ $(readlink /opt/bascule/current) != {running} ]'\n")

    def upgrade() -> None:
        bad = broken_milter(hosts, present)
        text = hosts.play("plug", inventory, "--extra-vars", f"base__wheel={bad}", fails=True)
        hosts.insist_said(
            text,
            "goes on as it was plugged in before",
            "bascule-milter of",
            "in its place again, but bascule-worker.service does not start",
        )

    puts_nothing_off(hosts, traffic, upgrade)
    mail.run(f"rm /{fault} && systemctl daemon-reload && systemctl restart bascule-worker")
    hosts.insist(fingerprint(mail) == before, "the configuration is as it was")
    hosts.insist_current(mail)
    hosts.insist_unchanged(hosts.play("plug", inventory))
    takes_up_what_was_interrupted(hosts, inventory)
    hosts.tell("unplugging is refused, for mail comes here")
    text = hosts.play("unplug", inventory, fails=True)
    hosts.insist_said(text, f"{DOMAIN}: bascule takes this mail here")
    hosts.insist(fingerprint(mail) == before, "nothing was changed")


def takes_up_what_was_interrupted(hosts: Hosts, inventory: Path) -> None:
    """A run that ended after it had written its files, and before anybody had read them."""
    mail = hosts.machines["mail"]
    hosts.tell("what an interrupted run has written is taken up by the next one")
    mail.run(
        # Where there is a file of those whom Dovecot trusts, that is what it has not read.
        "touch /etc/postfix/master.cf; trust=/etc/bascule/authorities.pem; "
        'if [ -e "$trust" ]; then touch "$trust"; else touch /etc/dovecot/conf.d/*-bascule.conf; fi; '
        "for site in /etc/nginx/sites-enabled/zz-bascule.conf /etc/apache2/sites-enabled/zz-bascule.conf; do "
        'if [ -e "$site" ]; then touch "$site"; fi; done'
    )
    web = "apache2" if mail.run("ls -A /etc/apache2/sites-enabled 2> /dev/null || true") else "nginx"
    text = hosts.play("plug", inventory)
    for server in ("dovecot", "postfix", web):
        taken = re.search(rf"Have its configuration taken up by {server}\].*\nchanged:", text)
        hosts.insist(taken, f"{server} has taken it up:\n{text[-20000:]}")
    hosts.insist_unchanged(hosts.play("plug", inventory))


def restores_byte_for_byte(hosts: Hosts, inventory: Path, before: dict[str, str], operator: Operator) -> None:
    """Out again, after the operator has edited what was plugged into."""
    mail = hosts.machines["mail"]
    hosts.tell("unplugged, after the operator has edited main.cf; everything but that is as it was, byte for byte")
    mail.run("echo 'message_size_limit = 20000000' >> /etc/postfix/main.cf")
    # The messages are counted; nobody's mail comes here any more.
    elsewhere = ("--extra-vars", json.dumps({"database__served_elsewhere": [DOMAIN]}))
    hosts.play("unplug", inventory, *elsewhere)
    mail.run("sed -i '$d' /etc/postfix/main.cf && systemctl reload postfix")
    after = fingerprint(mail)
    different = sorted(set(before.items()) ^ set(after.items()))
    hosts.insist(not different, f"the configuration is what it was: {different}")
    hosts.tell(f"{len(after)} files under {', '.join(CONFIGURATION)} are the same, byte for byte")
    with hosts.client(mail, operator.login, PASSWORD) as anna:
        hosts.insist(anna.folder_exists("INBOX"), "the operator's own users log in as before")
    operator.works(mail)
    hosts.insist_unchanged(hosts.play("unplug", inventory, *elsewhere))


def fingerprint(machine: Machine) -> dict[str, str]:
    """Every file of the configuration that bascule may touch: digest, owner and mode, by path; and the mail root."""
    listing = machine.run(
        f"find $(ls -d {' '.join(CONFIGURATION)} 2> /dev/null) -type f ! -name '*.db' -exec sh -c 'for f; do echo \"$f "
        '$(sha256sum < "$f" | cut -c 1-64) $(stat -c %U:%G:%a "$f")"; done\' sh {} +;'
        "find /etc/apache2 /etc/nginx -type l -printf '%p %l\\n' 2> /dev/null;"
        f"stat -c '%n %U:%G:%a' $(ls -d {' '.join(MAIL)} 2> /dev/null | grep -Fvx /home/bascule)"
    )
    return dict(line.split(" ", 1) for line in listing.splitlines())


def only(files: dict[str, str], below: str) -> dict[str, str]:
    return {path: said for path, said in files.items() if path.startswith(below)}


def several(hosts: Hosts) -> None:
    """Database, two MX, a store and the page, each on a host of its own, of both releases."""
    releases = {"db": "bookworm", "store1": "trixie", "mx1": "bookworm", "mx2": "trixie", "page": "bookworm"}
    hosts.start(releases)
    groups = {"database": ["db"], "store": ["store1"], "mx": ["mx1", "mx2"], "portal": ["page"]}
    there = hosts.network.names
    inventory = hosts.inventory(
        groups,
        hosts.wheel(),
        database__clients=["10.77.0.0/24"],
        base__database_options="{{ '' if inventory_hostname in groups['database'] else "
        "'host=db.lab.test sslmode=verify-full sslrootcert=/etc/ssl/certs/ca-certificates.crt' }}",
        postfix__networks=["127.0.0.0/8", there["store1.lab.test"]],
        dovecot__submission_host="mx1.lab.test",
        store__lmtp_port=24,
        settings={
            "worker": {"store": "store1"},
            "dovecot": {"imap": "store1.lab.test:143"},
            "postfix": {"smtp": "mx1.lab.test:25"},
        },
    )
    # Passwords of root's own for other databases.
    own = "db.shop.test:*:*:root:a secret"
    for machine in hosts.machines.values():
        machine.run(f"umask 077; echo '{own}' > /root/.pgpass")
    hosts.play("build", inventory)
    hosts.insist_unchanged(hosts.play("build", inventory))
    for machine in hosts.machines.values():
        hosts.insist(machine.run("cat /root/.pgpass").strip() == own, "root's own passwords are as they were")
    hosts.testinfra(groups)
    mx1, store = hosts.machines["mx1"], hosts.machines["store1"]
    hosts.prepare(mx1, "store1 inet:store1.lab.test:24 --login-host store1.lab.test")
    with Traffic(25, hosts.legacy.users, hosts.ledger, host=hosts.machines["mx2"].address):
        two_move(hosts, mx1, page=hosts.machines["page"], store=store)
        send(25, "by-mx1@outside.test", "alice", hosts.ledger, hosts.random, host=mx1.address)
        hosts.play("rotate", inventory)
        hosts.goes_back_and_moves_again(mx1, store, "bob")
        hosts.close(mx1)
    for name in ("mx1", "mx2"):
        queue_empties(hosts.machines[name])
    hosts.count(store)


def queue_empties(machine: Machine) -> None:
    """What was put off while the database was away is delivered at the latest now, as an administrator would do it."""
    eventually(
        f"the queue of {machine.name} is empty",
        lambda: "is empty" in machine.run("postqueue -f; sleep 1; postqueue -p"),
    )


SCENARIOS: dict[str, Callable[[Hosts], None]] = {
    "fresh-trixie": partial(fresh, release="trixie"),
    "build-bookworm": partial(build, release="bookworm"),
    "build-trixie": partial(build, release="trixie"),
    **{name: partial(plug, operator=operator) for name, operator in OPERATORS.items()},
    "several": several,
}


def play_here(scenario: str, checkout: Path) -> None:
    """Play a scenario in the namespaces of this process; its machines' disks are in memory, and gone with its mounts.

    Raises:
        LabError: something does not hold; what the machines' journals say of it was printed.
    """
    own_control_groups()
    folder = Path(tempfile.mkdtemp(prefix="bascule-lab-"))
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))
    hosts = Hosts(folder, checkout)
    try:
        SCENARIOS[scenario](hosts)
    except LabError:
        for machine in hosts.machines.values():
            print(
                machine.try_run("journalctl -n 60 --no-pager -o cat -u 'bascule*' -u dovecot").stdout, file=sys.stderr
            )
        raise
    finally:
        hosts.stop()
        run("umount", "--lazy", str(folder))
        folder.rmdir()


@click.command()
@click.option("--checkout", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--here", is_flag=True, hidden=True, help="In the namespaces of this process.")
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
def main(checkout: Path, here: bool, scenarios: tuple[str, ...]) -> None:
    """Play SCENARIOS, or all of them; exit status 1, with the reason, when anything does not hold."""
    if here:
        for scenario in scenarios:
            try:
                play_here(scenario, checkout)
            except LabError as error:
                sys.exit(f"\n{scenario} FAILED: {error}")
        return
    failed = []
    for scenario in scenarios or tuple(SCENARIOS):
        print(f"\n=== {scenario}", flush=True)
        command = [*NAMESPACES, sys.executable, "-m", __spec__.name, "--checkout", str(checkout), "--here", scenario]
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
            failed.append(scenario)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    print("\nAll of it holds. Nothing is left running.")


if __name__ == "__main__":
    main()
