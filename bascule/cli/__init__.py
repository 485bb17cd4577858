"""The command ``bascule``: what an administrator does.

Exit status: 0 done, 1 refused or failed (nothing was changed), 2 wrong usage.
Passwords are asked for at the terminal or read from a file or standard input,
never taken from the command line.
"""

from __future__ import annotations

from bascule.cli.command import main

__all__ = ["main"]
