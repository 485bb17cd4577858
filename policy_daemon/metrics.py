"""What Prometheus is told of routing."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

LOOKUPS = Counter("bascule_socketmap_lookups", "Requests of Postfix's maps", ["map", "status"])
VERIFICATIONS = Counter(
    "bascule_policy_verifications", "Policy requests at RCPT TO, by the action answered", ["action"]
)
PROBES = Counter("bascule_legacy_probes", "Recipients asked about at the legacy server, by its verdict", ["verdict"])
SIGHTINGS = Counter("bascule_sightings", "Accepted recipients whose mail goes to the legacy server")
BARRIER = Histogram(
    "bascule_barrier_seconds",
    "From the submission of a barrier to its arrival",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
SIGHTINGS_DROPPED = Counter(
    "bascule_sightings_dropped", "Sightings for which there was no place, in memory or in the database"
)
UNPLUGGED = Gauge("bascule_postfix_unplugged", "Settings of Postfix that no longer name bascule, see bascule check")
CHANGES_PENDING = Gauge("bascule_changes_pending", "Changes of state that are not yet in force in this Postfix")
