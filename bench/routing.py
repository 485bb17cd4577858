"""Postfix with bascule's maps against Postfix with static hash maps: messages a second, in one run.

    venv/bin/python bench/routing.py [--messages 3000] [--rounds 5]

Two Postfix instances of the lab take mail by SMTP from smtp-source(1), ten at a
time, each message for another mailbox, and deliver it by LMTP to one
smtp-sink(1). They differ in what they ask: ``hash`` has the same domains and
routes in hash: maps; ``maps`` asks the policy daemon for domains, routes and
aliases; ``whole`` has all of config_templates/postfix: policy service and milter
as well. Turn by turn, so that all see the same machine; the ratios are of the
medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

import psycopg

from bascule.lab.process import free_ports, program, run
from bascule.lab.servers import Postfix
from bascule.lab.sites import DOMAIN, Lab, eventually

SENDERS = 10
#: What of the product's own main.cf each instance leaves out.
LEFT_OUT = {
    "hash": r"^(transport_maps|relay_domains|virtual_alias_maps|smtpd_sender_login_maps|smtpd_recipient_restrictions|"
    r"smtpd_milters)\b",
    "maps": r"^(smtpd_recipient_restrictions|smtpd_milters)\b",
    "whole": r"^$",
}


def fill(lab: Lab, sink: str, mailboxes: int) -> None:
    """Users who have moved, by the names that smtp-source makes: 1user, 2user and so on."""
    with psycopg.connect(lab.new.postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute("SET search_path = bascule, queue")
        connection.execute("INSERT INTO store VALUES ('sink', %s)", (sink,))
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO mailbox (domain_id, local_part, full_address, store, state, password_hash) "
            "SELECT domain.id, number || 'user', number || 'user@lab.test', 'sink', 'local', '{ARGON2ID}x' "
            "FROM domain, generate_series(0, %s) AS number",
            (mailboxes,),
        )


def without(text: str, pattern: str) -> str:
    """main.cf without the parameters that match, continuation lines and all."""
    kept, dropping = [], False
    for line in text.splitlines():
        if not line.startswith((" ", "#")):
            dropping = bool(re.match(pattern, line))
        if not dropping:
            kept.append(line)
    return "\n".join(kept) + "\n"


def instance(lab: Lab, kind: str, sink: str, mailboxes: int) -> Postfix:
    postfix = Postfix(lab.folder / f"postfix-{kind}", free_ports(1)[0], "new")
    queue = postfix.folder / "queue"
    postfix.create(hostname="bench.lab.test", postfix_queue=queue, extends=False, **lab.new.settings.model_dump())
    main = postfix.folder / "main.cf"
    text = without(main.read_text(), LEFT_OUT[kind])
    if kind == "hash":
        postfix.map("transport", {f"{number}user@{DOMAIN}": f"bascule-lmtp:{sink}" for number in range(mailboxes)})
        postfix.map("domains", {DOMAIN: DOMAIN})
        postfix.map("aliases", {f"alias{number}@{DOMAIN}": f"{number}user@{DOMAIN}" for number in range(100)})
        folder = postfix.folder
        text += f"transport_maps = hash:{folder}/transport\nrelay_domains = hash:{folder}/domains\n"
        text += f"virtual_alias_maps = hash:{folder}/aliases\nsmtpd_recipient_restrictions =\n"
    main.write_text(text)
    postfix.start()
    return postfix


def messages_a_second(postfix: Postfix, count: int) -> float:
    """From the first connection to the empty queue."""
    begin = time.monotonic()
    run(
        program("smtp-source"), "-s", str(SENDERS), "-m", str(count), "-l", "2000", "-N", "-f", "sender@elsewhere.test",
        "-t", f"user@{DOMAIN}", f"127.0.0.1:{postfix.port}", timeout=600,
    )  # fmt: skip
    # Not postqueue: its answer takes time that both would be charged with.
    active = [postfix.folder / "queue" / name for name in ("incoming", "active", "maildrop")]
    while any(_holds_a_file(each) for each in active):
        time.sleep(0.002)
    return count / (time.monotonic() - begin)


def _holds_a_file(folder: Path) -> bool:
    return any(files for _, _, files in os.walk(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=3000, help="in each turn")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with Lab() as lab:
        lab.create({"x": "x"}, {})
        lab.prepare()
        lab.new.cli("activate", DOMAIN)
        sink = f"unix:{lab.folder / 'sink'}"
        fill(lab, sink, options.messages)
        lab.new.policy_daemon.stop()  # it was not told of them
        lab.new.policy_daemon.start()
        eventually("loaded", lambda: f"mailboxes={options.messages + 1}" in lab.new.policy_daemon.tail(5))
        os.umask(0)
        sinking = subprocess.Popen([program("smtp-sink"), "-L", "-u", "nobody", sink, "200"])
        try:
            instances = {kind: instance(lab, kind, sink, options.messages + 1) for kind in LEFT_OUT}
            try:
                figures: dict[str, list[float]] = {kind: [] for kind in instances}
                for number in range(options.rounds + 1):
                    for kind, postfix in instances.items():
                        figure = messages_a_second(postfix, options.messages)
                        if number:  # the first turn fills caches
                            figures[kind].append(figure)
                base = statistics.median(figures["hash"])
                print(f"{options.messages} messages of 2,000 bytes in each turn, {SENDERS} sessions")
                for kind, values in figures.items():
                    middle = statistics.median(values)
                    spread = f"{min(values):.0f} to {max(values):.0f}"
                    print(f"  {kind:6} {middle:7.0f} messages/s  ({spread})  {middle / base:.2f} of hash")
            finally:
                for postfix in instances.values():
                    postfix.stop()
        finally:
            sinking.terminate()
            sinking.wait()


if __name__ == "__main__":
    main()
