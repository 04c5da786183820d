# SPDX-License-Identifier: Apache-2.0
"""The C tests of the NVMe device against a controller in memory, plain and with sanitizers."""

from __future__ import annotations

import pytest

from tests.support.c_programs import CPrograms

SANITIZERS = [("plain", 1500), ("asan", 400), ("tsan", 300)]
SHAPES = [(512, 8, 1), (4096, 3, 2), (512, 64, 3), (4096, 1024, 4)]


@pytest.mark.parametrize(("block", "depth", "seed"), SHAPES)
@pytest.mark.parametrize(("sanitizer", "requests"), SANITIZERS)
def test_against_model(
    c_programs: CPrograms, sanitizer: str, requests: int, block: int, depth: int, seed: int
) -> None:
    """Every kind of request from every kind of memory, with errors that pass, lost commands, and resets."""
    program = c_programs.build("test_nvme", sanitizer)
    lines = c_programs.run(program, str(requests), str(seed), str(block), str(depth))
    assert lines[-1] == "ok"


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_faults(c_programs: CPrograms, sanitizer: str) -> None:
    """Status codes, breaches of the protocol, timeouts with and without a working abort, resets."""
    assert c_programs.run(c_programs.build("test_nvme_faults", sanitizer))[-1] == "ok"


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_cases(c_programs: CPrograms, sanitizer: str) -> None:
    """What commands and PRPs look like."""
    assert c_programs.run(c_programs.build("test_nvme_cases", sanitizer))[-1] == "ok"


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
def test_shared_memory(c_programs: CPrograms, sanitizer: str) -> None:
    """What is mapped, evicted, and let go when its owner takes it away."""
    assert c_programs.run(c_programs.build("test_nvme_dma", sanitizer, ("pthread_create",)))[-1] == "ok"


@pytest.mark.parametrize("sanitizer", ["plain", "asan"])
def test_addresses(c_programs: CPrograms, sanitizer: str) -> None:
    """The addresses that a VFIO container gives out."""
    assert c_programs.run(c_programs.build("test_nvme_vfio", sanitizer, ("ioctl",)))[-1] == "ok"


@pytest.mark.parametrize(("sanitizer", "batches"), [("plain", 400), ("asan", 200), ("tsan", 200)])
def test_exports_share_their_memory(c_programs: CPrograms, sanitizer: str, batches: int) -> None:
    """NBD clients and a guest on the device: nearly all that they read and write is not copied."""
    assert c_programs.run(c_programs.build("test_nvme_traffic", sanitizer), str(batches))[-1] == "ok"
