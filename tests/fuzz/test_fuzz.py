# SPDX-License-Identifier: Apache-2.0
"""Every fuzz target for a few seconds, from the repository's corpus. scripts/fuzz runs them for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.run import run
from tests.fuzz.seeds import all_seeds
from tests.fuzz.targets import CORPUS, TARGETS, CTarget, build

SECONDS = 4
C_TARGETS = [name for name, target in TARGETS.items() if isinstance(target, CTarget)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    build(C_TARGETS, path)
    return path


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_target(built: Path, tmp_path: Path, name: str) -> None:
    outcome = run(name, built, tmp_path, seconds=SECONDS)
    assert not outcome.failed, outcome.output
    # Even on a busy machine under a sanitizer; a target that does nothing, or hangs, is none.
    assert outcome.executions > 20 * SECONDS


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_is_what_the_seeds_make(name: str) -> None:
    kept = {path.name: path.read_bytes() for path in (CORPUS / name).iterdir()}
    made = all_seeds()[name]
    assert {file: kept.get(file) for file in made} == made
    assert 10 <= len(kept) <= 60
