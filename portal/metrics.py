"""What Prometheus is told of the users' page."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

ANSWERS = Counter("bascule_page_answers", "Pages answered, by HTTP status", ["page", "status"])
REQUESTS = Counter("bascule_page_requests", "Forms that were sent in, by what became of them", ["result"])
SECONDS = Histogram("bascule_page_seconds", "How long pages took; a form waits for the legacy server", ["page"])
