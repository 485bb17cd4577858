"""Programs that a daemon runs: each has a deadline, and none outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress

from bascule.errors import BasculeError

#: Seconds that a killed child has to be gone; the kernel keeps one that waits for a disk for longer.
_PARTING = 2.0


class ChildFailed(BasculeError):
    """A program failed, or did not end in time and was killed."""


async def output_of(
    *command: str,
    timeout: float,  # noqa: ASYNC109 (the program is killed, not only left alone)
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Run ``command`` and give its standard output; ``timeout`` in seconds. It is killed, with what it started, when
    its time is over and when the caller is cancelled.

    Raises:
        ChildFailed: it cannot be started, ended with an error, or did not end in time.
    """
    name = command[0].rpartition("/")[2]
    starting = asyncio.ensure_future(_start(*command, environment=environment))
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # It may run already, although nobody has heard so.
        with suppress(OSError):
            await _kill(await starting)
        raise
    except OSError as error:
        raise ChildFailed(f"{name} cannot be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout):
            output, errors = await process.communicate()
    except TimeoutError as error:
        raise ChildFailed(
            f"{name} did not end within {timeout:g} s and was killed",
            hint=f"Run it by hand: {' '.join(command)}",
        ) from error
    finally:
        if process.returncode is None:
            await _kill(process)
    if process.returncode != 0:
        raise ChildFailed(f"{name} ended with {process.returncode}: {errors.decode(errors='replace').strip()}")
    return output


async def _start(*command: str, environment: Mapping[str, str] | None) -> asyncio.subprocess.Process:
    """In a session of its own."""
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


async def _kill(process: asyncio.subprocess.Process) -> None:
    """End it and its own children: they are one session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Its pipes end with the last who held them, so that nothing of it outlives the loop. Not waited for without end:
    # the loop collects it whenever it goes.
    with suppress(TimeoutError):
        async with asyncio.timeout(_PARTING):
            await process.communicate()
