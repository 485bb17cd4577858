"""A table of figures, as a benchmark prints it: for a terminal, or as Markdown with what it was measured on."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
from pathlib import Path

from bascule.lab.process import LabError, program

#: How each says its version.
SERVERS = {
    "PostgreSQL": ("psql", "--version"),
    "Postfix": ("postconf", "-dh", "mail_version"),
    "Dovecot": ("dovecot", "--version"),
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has; its own are added to them."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--markdown", action="store_true", help="print the tables as docs/benchmarks.md has them")
    return made


class Table:
    """Printed row by row; in Markdown with the machine below its heading."""

    def __init__(self, *columns: str, markdown: bool, width: int = 44) -> None:
        """The first column is ``width`` characters wide on a terminal; the others are for figures."""
        self._markdown = markdown
        self._widths = (width, *(max(9, len(column)) for column in columns[1:]))
        if markdown:
            print(f"{machine()}\n", flush=True)
        self.row(*columns)
        if markdown:
            print("|" + "---|" * len(columns), flush=True)

    def row(self, *cells: object) -> None:
        """Print a row; a float is given one figure after the point, or two below ten."""
        texts = [_text(cell) for cell in cells]
        if self._markdown:
            print(f"| {' | '.join(texts)} |", flush=True)
            return
        first, *others = zip(texts, self._widths, strict=False)
        print(" ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]), flush=True)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) < 10 else f"{cell:,.1f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def machine() -> str:
    """What a table was measured on, in one line."""
    processor = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    system = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    said = [
        system.get("PRETTY_NAME", "Linux").strip('"'),
        f"{os.cpu_count()} processors" + (f" ({processor[1]})" if processor else ""),
        f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "",
        f"Python {platform.python_version()}",
        *(f"{name} {version(*command)}" for name, command in SERVERS.items()),
    ]
    return "; ".join(each for each in said if each)


def version(name: str, *arguments: str) -> str:
    """The first number in what a program says of itself, or that it is not here."""
    try:
        text = subprocess.run([program(name), *arguments], capture_output=True, text=True, check=False).stdout
    except LabError:
        return "is not here"
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else "of an unknown version"
