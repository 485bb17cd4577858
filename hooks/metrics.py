"""What Prometheus is told of logins."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

LOGINS = Counter(
    "bascule_logins", "Logins that were decided here, by Dovecot's service and the result", ["service", "result"]
)
REMEMBERED = Counter("bascule_logins_remembered", "Logins decided without checking the password again")
BARRED = Counter("bascule_logins_barred", "Logins slowed down, for too many wrong passwords")
LEGACY_LOGIN = Histogram("bascule_legacy_login_seconds", "How long the legacy server took for a login")
