# SPDX-License-Identifier: Apache-2.0
"""What `pip install .` gives: every module, the extension, and a console command that works."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.tools import run

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "target")


@pytest.fixture
def wheel(scratch: Path) -> Path:
    """A wheel made from a copy of the sources, without anything that was built in place."""
    source = scratch / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("_datapath*", "_iscsi*", "*.o", "*.so", "__pycache__")
    for name in NEEDED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore)
        else:
            shutil.copy(path, source / name)
    options = ["-q", "--no-deps", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", scratch, source)
    (path,) = scratch.glob("*.whl")
    return path


def test_wheel_is_whole_and_runs(wheel: Path, scratch: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(scratch / "installed")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "target").rglob("*.py")}
    assert modules <= set(names)
    for extension in ("_datapath", "_iscsi"):
        path = f"target/datapath/{extension}."
        assert any(name.startswith(path) and name.endswith(".so") for name in names), extension
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    code = "import sys; from target.cli.main import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "daemon", "--blockdev", "help"]
    done = subprocess.run(argv, cwd=scratch / "installed", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "qcow2" in done.stdout
    (entry_points,) = (scratch / "installed").glob("*.dist-info/entry_points.txt")
    assert "blocktarget = target.cli.main:main" in entry_points.read_text()
