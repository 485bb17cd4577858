"""The alerts are raised by what they are for, and the dashboard can be read: by Prometheus' own tool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bascule.lab.process import program

FOLDER = Path(__file__).parents[2] / "monitoring"


def promtool(*arguments: str) -> None:
    done = subprocess.run([program("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts-test.yml")


def test_every_query_of_the_dashboard_is_one(tmp_path: Path) -> None:
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 20
    rules = [{"record": f"query:{n}", "expr": each.replace("$domain", ".*")} for n, each in enumerate(queries)]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_no_panel_covers_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((FOLDER / "grafana-dashboard.json").read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
