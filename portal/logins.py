"""The check of a password at the legacy server, which ends in time whatever that server does."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyUnavailable
from bascule.legacy import LegacySettings, Trust, authenticate
from bascule.shares import Shares

#: Forms that wait for legacy servers at the same time. They have threads of their own: pages go on being shown.
IN_ALL = 64
AT_ONE_SERVER = 32


class LegacyLogins:
    """Logins at legacy servers; threads may share it."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._shares = Shares(in_all=IN_ALL, at_one_server=AT_ONE_SERVER)

    def check(self, legacy: LegacySettings, address: Address, password: Password) -> None:
        """Returns after ``trust.timeout`` seconds at the latest: each read has that time, and a server may drip.

        Raises:
            LegacyRefusedLogin: the password is wrong.
            LegacyUnavailable: it cannot be said now.
        """
        server = (legacy.imap_host, legacy.imap.port)
        self._shares.take(server)
        done: Future[None] = Future()

        def ask() -> None:
            try:
                authenticate(legacy, self._trust, address, password)
            except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
                done.set_exception(error)
            else:
                done.set_result(None)
            finally:
                self._shares.give_back(server)

        # A thread that is not waited for, not even when the process ends.
        threading.Thread(target=ask, name="legacy-login", daemon=True).start()
        answers = True
        try:
            done.result(self._trust.timeout)
        except TimeoutError as error:
            answers = False
            raise LegacyUnavailable(f"{server[0]}:{server[1]} does not answer in time") from error
        except LegacyUnavailable as error:
            answers = not isinstance(error.__cause__, OSError)
            raise
        finally:
            self._shares.judge(server, answers=answers)
