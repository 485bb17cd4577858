"""The names of the parts: neither pymilter's C extension ``milter`` nor the package ``ansible`` is hidden.

The folders stand at the top of the tree and are imported below ``bascule``.
Every way to install and to test is tried in an environment of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORTS = """
import milter, bascule.milter.service, bascule.policy_daemon.service, bascule.lab.story, bascule.schema
assert milter.__file__.endswith(".so"), milter.__file__
assert bascule.schema.head() == "0002"
from bascule.config_templates import render
assert "bascule-hold" in render("postfix/master.cf.j2", legacy={"ca_file": None})
import bascule; print(bascule.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=shutil.ignore_patterns(".*", "build")))


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that has every library that this one has, but not bascule."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "bascule" not in entry.name:
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.parametrize("how", [(), ("-e",)], ids=["install", "editable"])
def test_every_way_to_install_and_to_test(tree: Path, environment: Path, how: tuple[str, ...]) -> None:
    run(environment, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", *how, ".", cwd=tree)
    installed = run(environment, "-c", IMPORTS, cwd=Path("/")).strip()
    assert str(tree) in installed if how else str(environment.parents[1]) in installed
    # From the root of the tree, which python -c and python -m put first on sys.path.
    run(environment, "-c", IMPORTS, cwd=tree)
    tests = ("tests/unit/test_netstring.py", "tests/unit/test_milter.py", "-q", "-p", "no:cacheprovider")
    run(environment, "-m", "pytest", *tests, cwd=tree)
    run(environment, "-c", "import sys, pytest; del sys.path[0]; sys.exit(pytest.main(sys.argv[1:]))", *tests, cwd=tree)
    assert "Move a mail domain" in run(environment.parent / "bascule", "--help", cwd=Path("/"))
    for program in ("bascule", "bascule-worker", "bascule-checkpassword"):
        assert (environment.parent / program).exists()


def test_the_folders_that_would_hide_a_package_are_not_packages() -> None:
    for name in ("milter", "ansible"):
        assert not (ROOT / name / "__init__.py").exists()


def test_parts_import_the_core_and_never_each_other() -> None:
    parts = ("policy_daemon", "milter", "hooks", "migrator", "portal")
    for part in parts:
        others = [f"bascule.{other}" for other in parts if other != part] + ["bascule.lab"]
        for path in (ROOT / part).glob("*.py"):
            text = path.read_text()
            assert not [other for other in others if other in text], path
    for path in (ROOT / "bascule").glob("*.py"):
        text = path.read_text()
        assert not [part for part in parts if f"bascule.{part}" in text], path


def test_the_interpreter_that_runs_this_has_no_shadowed_milter() -> None:
    import milter  # noqa: PLC0415 (the point of the test)

    assert milter.__file__.endswith(".so"), sys.path
