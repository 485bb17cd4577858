"""More Dovecots in front of the same store: with the Lua passdb, and Debian 13's Dovecot 2.4."""

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from bascule import hooks
from bascule.config_templates import render
from bascule.lab.process import VMAIL, Daemon
from bascule.lab.servers import Dovecot, Tree
from bascule.lab.sites import NewSite, executable, make_deputy_folder
from bascule.settings import Authenticator

#: Made by lab/setup.sh.
TRIXIE = Path("/var/cache/bascule/trixie")
_NUMBERS = count(1)


class Front:
    """A Dovecot, and an authenticator of its own that ends its proxied sessions; use it in a ``with`` statement."""

    def __init__(
        self, new: NewSite, version: str, *, own_users: dict[str, str] | None = None, auth_cache_size: str = ""
    ) -> None:
        """``own_users`` are the operator's own, by local part, with their passwords."""
        self._new = new
        self._own_users = own_users
        self._auth_cache_size = auth_cache_size
        self.folder = new.folder / f"front-{version}-{next(_NUMBERS)}"
        self._tree = Tree(TRIXIE, new.folder.parent) if version == "2.4" else None
        self.version = version
        self.dovecot = Dovecot(self.folder / "dovecot", "new", self._tree)

    def __enter__(self) -> Front:
        self.folder.mkdir()
        self.folder.chmod(0o755)
        passdb = self.folder / "passdb.lua"
        shutil.copy(Path(hooks.__file__).parent / "passdb.lua", passdb)
        stub = self.folder / "bascule.lua"
        new = self._new
        settings = new.settings.model_copy(
            update={
                "node": self.folder.name,
                "dovecot": new.settings.dovecot.model_copy(update={"config_file": self.dovecot.config}),
                "authenticator": Authenticator(
                    socket=self.folder / "authenticator",
                    snapshot=self.folder / "logins.sqlite",
                    domains=self.folder / "domains",
                    deputy=self.folder / "deputy",
                    deputy_until=self.folder / "deputy-until",
                ),
            }
        )
        make_deputy_folder(settings.authenticator.deputy, os.geteuid())
        self.settings = settings
        values = settings.model_dump()
        stub.write_text(render("dovecot/passdb.lua.j2", passdb_lua=passdb, **values))
        toml = self.folder / "bascule.toml"
        toml.write_text(render("bascule.toml.j2", **values))
        self.dovecot.create(
            new.certificate,
            new.smtp_port,
            template="new-dovecot.conf.j2" if self._tree is None else "new-dovecot-2.4.conf.j2",
            passdb_lua_stub=stub,
            vmail_uid=VMAIL,
            vmail_gid=VMAIL,
            before_static=False,
            mail_by_userdb=False,
            own_users=bool(self._own_users),
            auth_cache_size=self._auth_cache_size,
            **values,
        )
        homes = self.folder / "own"
        homes.mkdir()
        os.chown(homes, VMAIL, VMAIL)
        (self.dovecot.folder / "own").write_text(
            "".join(
                f"{name}:{{PLAIN}}{password}:{VMAIL}:{VMAIL}::{homes}/{name}::\n"
                for name, password in (self._own_users or {}).items()
            )
        )
        # As root: it has to use the doveadm of another tree.
        programs = self.folder / "bin"
        programs.mkdir()
        if self._tree is not None:
            self._wrap(programs / "doveadm", self._tree)
        self.authenticator = Daemon(
            [executable("bascule-authenticator"), "--settings", str(toml)],
            folder=self.folder,
            name="authenticator",
            environment={"PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        self._stack = ExitStack()
        self._stack.callback(self.dovecot.stop)
        self._stack.callback(self.authenticator.stop)
        try:
            self.authenticator.start()
            self.dovecot.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    @staticmethod
    def _wrap(path: Path, tree: Tree) -> None:
        path.write_text(f'#!/bin/sh\nexec {shlex.join(tree.command("doveadm"))} "$@"\n')
        path.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        # Else every flip would wait for it: sessions might still be proxied there.
        self._new.forget_node(self.folder.name, "authenticator")
