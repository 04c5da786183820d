# SPDX-License-Identifier: Apache-2.0
"""Runs `blocktarget serve` on a configuration file, in a directory of its own."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import STOP_SECONDS, blocktarget_argv

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
READY = "blocktarget: ready"


@contextmanager
def serving(config: str, directory: Path) -> Iterator[list[str]]:
    """Serves the text of a configuration; gives the lines printed until it was ready. It must end with 0."""
    path = directory / "config.yaml"
    path.write_text(config)
    argv = blocktarget_argv("serve", path)
    with subprocess.Popen(argv, cwd=directory, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                if line.rstrip() == READY:
                    break
                lines.append(line.rstrip())
            assert process.poll() is None, lines
            yield lines
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0
