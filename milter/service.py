"""The process on every MX. Postfix takes mail without us (``milter_default_action = accept``).

This folder has no ``__init__.py``, on purpose: pymilter's C extension is called
``milter``, and a regular package of that name would hide it.
"""

from __future__ import annotations

import os
from pathlib import Path

import Milter

from bascule import program
from bascule.endpoint import address_of, connected
from bascule.metrics import serve
from bascule.milter.guard import Guard
from bascule.milter.routes import Routes
from bascule.milter.seal import Sealer
from bascule.readiness import attend
from bascule.settings import Settings


def _run(configuration: Settings) -> None:
    mine = configuration.milter
    Guard.node = configuration.node
    Guard.key = program.read_secret(mine.stamp_key, "stamp key")
    Guard.routes = Routes(configuration.policy_daemon.socketmap)
    Guard.sealer = None if mine.arc is None else Sealer(mine.arc)
    address = address_of(mine.socket)
    if isinstance(address, Path):
        address.unlink(missing_ok=True)
        where = str(address)
        os.umask(0)  # who may reach it is decided by its directory
    else:
        host, port = address
        where = f"inet:{port}@{host}"
    serve(mine.metrics)
    Milter.factory = Guard
    Milter.set_flags(Milter.ADDHDRS + Milter.SETSYMLIST)
    # An error of ours stops no mail, like our absence.
    Milter.set_exception_policy(Milter.CONTINUE)
    # libmilter opens the socket inside of runmilter and tells nobody: it is tried until it answers.
    attend(lambda: _answers(mine.socket))
    Milter.runmilter("bascule", where, timeout=300)


def _answers(endpoint: str) -> bool:
    try:
        connected(endpoint).close()
    except OSError:
        return False
    return True


main = program.command("milter", "Stamp mail and guard against loops.", _run)
