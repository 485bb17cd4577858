"""Structured logs: one line an event, ``key=value``, to standard error (the journal adds the time).

Passwords never reach a logger: they travel in :class:`bascule.credential.Password`,
which does not print itself.
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure(part: str) -> None:
    """Send our events, and those of the libraries from WARNING up, to standard error."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="level=%(levelname)s logger=%(name)s event=%(message)r",
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["level", "part", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(part=part)


def get() -> structlog.typing.FilteringBoundLogger:
    """The logger of a module."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
