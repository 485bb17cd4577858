"""How long ``bascule import`` takes for 10,000 users.

    venv/bin/python bench/import_users.py [--users 10000] [--at-once 8]

The lab's legacy server (Dovecot, IMAP with TLS) and database; the domain is
paused, so that nobody is moved meanwhile. The peer is the logins alone: the
same passwords tried by as many threads with imapclient, which is what any
import that checks passwords has to do.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bascule.address import Address
from bascule.credential import Password
from bascule.lab.process import run
from bascule.lab.sites import DOMAIN, Lab, executable, full
from bascule.lab.table import Table, parser
from bascule.legacy import LegacySettings, Service, Trust, authenticate


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__)
    options_of.add_argument("--users", type=int, default=10_000)
    options_of.add_argument("--at-once", type=int, default=8)
    options = options_of.parse_args()
    users = {f"user-{number}": f"password-{number}" for number in range(options.users)}
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="bascule-bench-") as folder:
        lab.create(users, {})
        lab.prepare()
        lab.new.cli("activate", DOMAIN)
        lab.new.cli("pause", DOMAIN, "--reason", "so that only the import is measured")
        legacy = LegacySettings(
            DOMAIN, "localhost", Service(lab.legacy.ports.imaps, "implicit"), "127.0.0.1", lab.legacy.smtp_port
        )
        trust = Trust(lab.new.settings.legacy.ca_file, 30)

        def log_in(name: str) -> None:
            authenticate(legacy, trust, Address.parse(full(name)), Password(users[name]))

        table = Table("", "seconds", "users a second", "ratio", markdown=options.markdown)
        began = time.perf_counter()
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(log_in, users))
        peer = time.perf_counter() - began
        table.row("peer: the logins alone", peer, len(users) / peer, 1.0)

        file = Path(folder) / "users.csv"
        rows = [f"{full(name)},{password},First,Last" for name, password in users.items()]
        file.write_text("\n".join(["address,password,first_name,last_name", *rows]))
        for what in ("bascule import", "the same file once more"):
            began = time.perf_counter()
            command = ("--settings", str(lab.new.settings_file), "import", DOMAIN, str(file))
            run(executable("bascule"), *command, "--at-once", str(options.at_once), timeout=3600)
            taken = time.perf_counter() - began
            table.row(what, taken, len(users) / taken, taken / peer)


if __name__ == "__main__":
    main()
