"""The Ansible module that plugs settings into a main.cf, loaded from its file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from bascule.lab.process import LabError


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "ansible" / "plugins" / "modules" / "main_cf.py"
    spec = importlib.util.spec_from_file_location("main_cf", path)
    if spec is None or spec.loader is None:
        raise LabError(f"{path} is not there: the lab runs in a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main_cf = _load()
