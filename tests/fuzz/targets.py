# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets: their names, how those in C are built, and the command that runs one. See run.py."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.c_programs import run_all

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
DATAPATH = ROOT / "target" / "datapath"
C = HERE / "c"
TIMEOUT = 20  # seconds for one input

# A piece of a request is small here, so that large requests are cheap; that is all that differs.
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{DATAPATH}", f"-I{C}", "-DNBD_PIECE=65536u"]
FUZZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The targets' own models and devices are not what is looked for: no coverage, and faster.
HELPERS = ["-O2", "-fsanitize=address"]


@dataclass(frozen=True)
class CTarget:
    """tests/fuzz/c/NAME.c. helpers: files beside it. datapath: what it is linked with, but for thread.c."""

    name: str
    helpers: tuple[str, ...] = ()
    datapath: tuple[str, ...] = ("*.c",)
    inline_thread: bool = True
    max_length: int = 2048
    round: int | None = None

    def command(self, built: Path) -> list[str]:
        return [str(built / self.name)]


@dataclass(frozen=True)
class PythonTarget:
    """The module tests.fuzz.python.NAME. round: executions after which a new process goes on, because atheris
    loses some memory at each comparison that it watches."""

    name: str
    max_length: int = 2048
    round: int | None = 100_000

    def command(self, built: Path) -> list[str]:
        return [sys.executable, "-m", f"tests.fuzz.python.{self.name}"]


Target = CTarget | PythonTarget
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        CTarget("iov_helpers", max_length=512),
        CTarget("iscsi_guard", datapath=("iov.c",), inline_thread=False, max_length=512),
        CTarget("map_walk", ("map_model", "ram_device")),
        CTarget("nbd_client", ("nbd_server_model",)),
        CTarget("nbd_session", ("nbd_model", "ram_device"), max_length=4096),
        CTarget("nvme_completion", max_length=1024),
        CTarget("vhost_memory", max_length=1024),
        CTarget(
            "vhost_ring",
            datapath=("vhost_*.c", "iov.c", "memory.c"),
            inline_thread=False,
            max_length=4096,
        ),
        PythonTarget("json_options"),
        PythonTarget("keyval_options"),
        PythonTarget("nbd_negotiation"),
        PythonTarget("nbd_options"),
        PythonTarget("qcow2_header"),
        PythonTarget("qcow2_image", max_length=13000),
        PythonTarget("qmp_stream", max_length=2048),
        PythonTarget("reservations", max_length=512),
        PythonTarget("vhost_messages"),
        PythonTarget("yaml_options"),
    )
}


def compiler() -> str:
    """clang, which Debian also installs under its version alone."""
    names = ["clang", *(f"clang-{version}" for version in range(25, 12, -1))]
    return next((name for name in names if shutil.which(name)), "clang")


def build(names: list[str], built: Path) -> None:
    """Compiles those of the targets that are in C, into ``built``."""
    built.mkdir(parents=True, exist_ok=True)
    wanted = [target for name in names if isinstance(target := TARGETS[name], CTarget)]
    if wanted:
        _compile(
            built,
            sorted(c for c in DATAPATH.glob("*.c") if c.name != "thread.c" and not c.name.startswith("_")),
        )
    helpers = {name for target in wanted for name in target.helpers}
    run_all([[compiler(), *FLAGS, *HELPERS, "-c", str(C / f"{name}.c")] for name in sorted(helpers)], built)
    run_all([_link_command(target, built) for target in wanted], built)


def _compile(built: Path, sources: list[Path]) -> None:
    flags = [*FLAGS, *FUZZED, "-fsanitize=fuzzer-no-link", "-c"]
    run_all([[compiler(), *flags, str(source)] for source in sources], built)


def _link_command(target: CTarget, built: Path) -> list[str]:
    """The command that compiles the target itself and links it with what is compiled."""
    helpers = [C / f"{name}.c" for name in target.helpers]
    sources = [C / f"{target.name}.c", *([C / "inline_thread.c"] if target.inline_thread else [])]
    used = [c for pattern in target.datapath for c in sorted(DATAPATH.glob(pattern))]
    used = [c for c in used if c.name != "thread.c" and not c.name.startswith("_")]
    objects = [built / c.with_suffix(".o").name for c in [*used, *helpers]]
    flags = [*FLAGS, *FUZZED, "-fsanitize=fuzzer", "-o", str(built / target.name)]
    return [compiler(), *flags, *map(str, [*sources, *objects]), "-luring", "-lpthread"]


def command(name: str, built: Path, found: Path, runs: int | None, seconds: int | None) -> list[str]:
    """The command line. Inputs ``found`` before are used, too; new ones and those that fail go there."""
    target = TARGETS[name]
    corpus = found / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_len={target.max_length}",
        "-len_control=0",
        f"-timeout={TIMEOUT}",
        f"-artifact_prefix={found}/{name}-",
        "-print_final_stats=1",
    ]
    if runs is not None:
        options.append(f"-runs={runs}")
    if seconds is not None:
        options.append(f"-max_total_time={seconds}")
    words = HERE / "dictionaries" / f"{name}.dict"
    if words.exists():
        options.append(f"-dict={words}")
    return [*target.command(built), *options, str(corpus), str(CORPUS / name)]
