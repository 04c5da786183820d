# SPDX-License-Identifier: Apache-2.0
"""What is saved is what runs, whatever has made it so; and it can be applied to what it was saved from."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from target.declarative.plan import Plan
from target.declarative.state import running
from target.graph.activity import activate, inactivate
from target.service import Service
from tests.interop.test_apply import SIZE, Config, apply, running_service

FILE: Config = {"driver": "file", "filename": "disk.raw"}
SERVER: Config = {"addr": {"type": "unix", "path": "nbd.sock"}}


@pytest.fixture(autouse=True)
def _in_scratch(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    (scratch / "disk.raw").write_bytes(bytes(SIZE))


def config(*nodes: Config, **exports: str) -> Config:
    """Exports by id: the nodes that they show."""
    return {
        "blockdevs": list(nodes),
        "nbd-servers": [SERVER],
        "exports": [{"type": "nbd", "id": id, "node-name": node} for id, node in exports.items()],
    }


@contextlib.asynccontextmanager
async def with_export_of_an_unnamed_file() -> AsyncIterator[tuple[Service, str]]:
    """And the name that the node got."""
    async with running_service(config({"driver": "raw", "node-name": "disk", "file": FILE})) as service:
        name = service.graph.get("disk").children["file"].node.name
        await apply(service, config({"driver": "raw", "node-name": "disk", "file": FILE}, e=name))
        yield service, name


async def test_a_node_that_was_made_inactive_is_saved_so() -> None:
    """It may be another program's now: it must not be opened for writing again."""
    start = config({"driver": "raw", "node-name": "disk", "file": FILE})
    async with running_service(start) as service:
        async with service.graph.change() as change:
            await inactivate(change, service.graph.get("disk"))
        saved = running(service).config()
        assert await apply(service, saved) == Plan()
    async with running_service(saved) as service:
        assert not service.graph.get("disk").active
        assert not service.graph.get("disk").children["file"].node.active
        assert running(service).config() == saved


async def test_a_child_made_active_alone_is_saved_so() -> None:
    file = {**FILE, "node-name": "file", "active": False}
    start = config(file, {"driver": "raw", "node-name": "disk", "file": "file", "active": False})
    async with running_service(start) as service:
        async with service.graph.change() as change:
            await activate(change, service.graph.get("file"))
        saved = running(service).config()
        assert await apply(service, saved) == Plan()
    async with running_service(saved) as service:
        assert (service.graph.get("file").active, service.graph.get("disk").active) == (True, False)


async def test_a_node_that_outlives_the_one_it_was_opened_for_is_saved() -> None:
    start = config({"driver": "raw", "node-name": "disk", "file": {**FILE, "node-name": "file"}}, e="file")
    async with running_service(start) as service:
        async with service.graph.change() as change:
            change.remove("disk")
        saved = running(service).config()
        assert [entry["node-name"] for entry in saved["blockdevs"]] == ["file"]
        assert await apply(service, saved) == Plan()
    async with running_service(saved) as service:
        assert running(service).exports["e"]["node-name"] == "file"


async def test_names_that_were_made_up_are_not_those_of_other_nodes() -> None:
    async with with_export_of_an_unnamed_file() as (service, name):
        taken = name.replace("#", "auto-")
        async with service.graph.change() as change:
            await change.add({"driver": "null-co", "node-name": taken})
        saved = running(service)
        assert saved.blockdevs[taken]["driver"] == "null-co"
        assert saved.blockdevs[saved.exports["e"]["node-name"]]["filename"] == "disk.raw"
        assert await apply(service, saved.config()) == Plan()
        again = saved.config()
    async with running_service(again) as service:
        assert service.exports["e"].node.filename == "disk.raw"


async def test_nodes_without_a_name_are_changed_by_the_name_that_they_have_in_the_file() -> None:
    async with with_export_of_an_unnamed_file() as (service, name):
        saved = running(service).config()
        entry = next(entry for entry in saved["blockdevs"] if entry["driver"] == "file")
        entry["discard"] = "ignore"
        assert (await apply(service, saved)).refused == []
        assert service.graph.get(name).settings.discard == "ignore"
        assert await apply(service, saved) == Plan()
        alone = {"blockdevs": [{"driver": "raw", "node-name": "disk", "file": FILE}]}
        assert (await apply(service, alone)).refused == []
        assert await apply(service, alone) == Plan()


async def test_a_file_whose_inline_child_has_other_users_can_be_applied_again() -> None:
    inline = config(
        {"driver": "raw", "node-name": "disk", "file": {**FILE, "node-name": "file"}}, e="disk", f="file"
    )
    apart = config(
        {**FILE, "node-name": "file"}, {"driver": "raw", "node-name": "disk", "file": "file"}, e="disk"
    )
    async with running_service(inline) as service:
        for wanted in (inline, apart, inline, running(service).config()):
            assert (await apply(service, wanted)).refused == []
            assert await apply(service, wanted) == Plan()


async def test_generic_options_of_a_child_that_has_become_one_of_its_own_are_saved() -> None:
    start = config(
        {"driver": "raw", "node-name": "disk", "auto-read-only": True, "file": {**FILE, "node-name": "file"}},
        e="disk",
        f="file",
    )
    async with running_service(start) as service:
        before = service.graph.get("file").settings
        saved = running(service).config()
    async with running_service(saved) as service:
        assert service.graph.get("file").settings == before
