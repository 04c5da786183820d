# SPDX-License-Identifier: Apache-2.0
"""``blocktarget dump-plugin``: what a script says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from target.cli.main import main

SCRIPT = """
import nbdkit
API_VERSION = 2
size = 0
def config(key, value):
    global size
    size = nbdkit.parse_size(value)
def dump_plugin(): print(f"size={size}")
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def list_exports(readonly, is_tls): return ["a", ("b", "the second")]
def cleanup(): print("clean")
def open(readonly): pass
def get_size(h): pass
def pread(h, buf, offset, flags): pass
"""


@pytest.fixture
def script(scratch: Path) -> str:
    path = scratch / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_fields(script: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["dump-plugin", script, "size=1M"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == ["name=python", f"script={script}", "api_version=2"]
    assert "thread_model=parallel" in lines and "nbdkit_python_maximum_api_version=2" in lines
    found = {line for line in lines if line.startswith("has_")}
    names = "config dump_plugin thread_model list_exports cleanup open get_size pread"
    assert found == {f"has_{name}=1" for name in names.split()}
    assert lines[-1] == "size=1048576"


def test_exports(script: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["dump-plugin", "--exports", script]) == 0
    assert capfd.readouterr().out == "a\nb\tthe second\nclean\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a script is expected"),
        (["SCRIPT", "size"], "expects key=value, not 'size'"),
        (["SCRIPT", "size=x"], "could not parse size string (x)"),
        (["/no/script"], "/no/script: cannot open file: No such file or directory"),
        (["SCRIPT", "--python", "/no/python"], "option --python: cannot run '/no/python'"),
        (["--unknown"], "unrecognized option"),
    ],
)
def test_wrong_use(script: str, capfd: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["dump-plugin", *(script if word == "SCRIPT" else word for word in words)]) == 1
    assert message in capfd.readouterr().err
