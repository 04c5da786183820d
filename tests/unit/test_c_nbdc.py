# SPDX-License-Identifier: Apache-2.0
"""The C test of the NBD client, under sanitizers: several I/O threads and connections, servers that die."""

import pytest

from tests.support.c_programs import CPrograms


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize(("mode", "connections"), [(0, 1), (1, 3), (2, 1), (2, 3)])
def test_requests_survive_servers(c_programs: CPrograms, sanitizer: str, mode: int, connections: int) -> None:
    """mode: simple, structured, extended. Seeds choose what the servers announce."""
    program = c_programs.build("test_nbdc", sanitizer)
    said = c_programs.run(program, str(mode), str(connections), "3", str(4 * connections + mode))
    assert said[-1] == "ok" and int(said[-2].split()[0]) > 10


@pytest.mark.parametrize("sanitizer", ["plain", "asan", "tsan"])
@pytest.mark.parametrize(("mode", "connections"), [(0, 1), (1, 1), (2, 2)])
def test_memory_that_is_taken_away_costs_nobody_else_the_connection(
    c_programs: CPrograms, sanitizer: str, mode: int, connections: int
) -> None:
    """The program knows no loss but the deaths of its servers."""
    program = c_programs.build("test_nbdc", sanitizer)
    said = c_programs.run(program, str(mode), str(connections), "3", str(mode), "300", "lost")
    assert said[-1] == "ok"
