"""What Prometheus is told of messages."""

from __future__ import annotations

from prometheus_client import Counter

MESSAGES = Counter("bascule_messages", "Messages taken, by the routes of their recipients", ["routes"])
LOOPS = Counter("bascule_loops_refused", "Messages refused because the legacy server had sent them back")
SEALS = Counter("bascule_arc_seals", "Messages that were to be sealed, by what came of it", ["outcome"])
