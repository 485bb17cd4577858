"""What Prometheus is told of the workers' own work, and of how far the domains are."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from bascule import log
from bascule.database import connect
from bascule.errors import BasculeError

FLIPS = Counter("bascule_moves", "Mailboxes that this worker has cut over")
HELD = Histogram(
    "bascule_held_seconds",
    "How long the mail of a mailbox was held for its cutover",
    buckets=(0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
FAILURES = Counter("bascule_attempts_failed", "Attempts that did not succeed", ["kind"])
COPIED = Counter("bascule_copied_bytes", "Message bytes copied from legacy servers")
AT_WORK = Gauge("bascule_worker_tasks", "Tasks under way in this worker")
STRAGGLERS = Counter("bascule_stragglers_brought", "Late messages brought here")


class Domains(Collector):
    """The view ``gauges``, read at each scrape. Every worker tells the same."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: the database is not asked when the collector is registered."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        names = ["domain", "state"]
        mailboxes = GaugeMetricFamily("bascule_mailboxes", "Mailboxes of active domains, by state", labels=names)
        failing = GaugeMetricFamily(
            "bascule_mailboxes_failing", "Those of them whose last attempt did not succeed", labels=names
        )
        waiting = GaugeMetricFamily(
            "bascule_mailboxes_waiting_for_password", "Those that wait for the user's new password", labels=names
        )
        longest = GaugeMetricFamily(
            "bascule_longest_in_state_seconds", "How long the longest of them has been in this state", labels=names
        )
        try:
            with connect(self._dsn) as connection:
                rows = connection.execute(
                    "SELECT domain, state, mailboxes, failing, waiting_for_password, longest_seconds "
                    "FROM bascule.gauges"
                ).fetchall()
        except BasculeError as error:
            log.get().warning("the domains cannot be told to Prometheus", reason=error.message)
            return
        for domain, state, *numbers in rows:
            for family, number in zip((mailboxes, failing, waiting, longest), numbers, strict=True):
                family.add_metric([domain, state], number)
        yield from (mailboxes, failing, waiting, longest)


def watch(dsn: str) -> None:
    """Report on the domains."""
    REGISTRY.register(Domains(dsn))
