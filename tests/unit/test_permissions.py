# SPDX-License-Identifier: Apache-2.0
"""Permissions: QEMU's default rules, conflicts and their words, changes that are all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from target.graph import permissions
from target.graph.errors import BlockError
from target.graph.graph import Graph
from target.graph.node import Node, NodeOptions
from target.graph.options import BlockdevRef
from target.graph.permissions import Perm
from target.graph.update import cumulative

CR, W, WU, RS = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE
ALL, NONE = Perm.ALL, Perm.NONE


class Format(Node, driver="test-permissions-format"):
    """A format with a backing child: all requests to its file."""

    is_format = True

    class Options(NodeOptions):
        file: BlockdevRef
        backing: BlockdevRef | None = None

    options: Options

    async def open(self) -> None:
        await self.attach("file", self.options.file)
        if self.options.backing is not None:
            await self.attach("backing", self.options.backing)

    @property
    def size(self) -> int:
        return self.children["file"].node.size


def null(name: str, **options: Any) -> dict[str, Any]:
    return {"driver": "null-co", "node-name": name, **options}


def format_node(name: str, **options: Any) -> dict[str, Any]:
    return {"driver": "test-permissions-format", "node-name": name, **options}


def test_values_are_those_of_the_lock_bytes() -> None:
    assert [bit.value for bit in (CR, W, WU, RS)] == [1, 2, 4, 8]
    assert permissions.describe(ALL) == "consistent read, write, write unchanged, resize"


@pytest.mark.parametrize(
    ("perm", "shared", "read_only", "wanted"),
    [
        (NONE, ALL, False, (CR | W | RS, CR | WU)),
        (NONE, ALL, True, (CR, CR | WU)),
        (CR | W, ALL, False, (CR | W | RS, CR | WU)),
        (CR | WU, CR, False, (CR | W | WU | RS, CR)),
    ],
)
def test_rules_for_formats(perm: Perm, shared: Perm, read_only: bool, wanted: tuple[Perm, Perm]) -> None:
    assert permissions.for_format(perm, shared, read_only) == wanted


@pytest.mark.parametrize(
    ("perm", "shared", "wanted"),
    [
        (CR | W | RS, ALL, (CR, ALL)),
        (CR | W, CR, (CR, CR | WU)),
        (NONE, ALL, (NONE, ALL)),
    ],
)
def test_rules_for_backing(perm: Perm, shared: Perm, wanted: tuple[Perm, Perm]) -> None:
    assert permissions.for_backing(perm, shared) == wanted


async def test_raw_needs_what_its_users_need(graph: Graph) -> None:
    await graph.add(null("n"))
    raw = await graph.add({"driver": "raw", "node-name": "r", "file": "n"})
    assert cumulative(graph.get("n")) == (NONE, ALL)
    edge = await graph.attach_root("a user", raw, CR | W, ALL & ~RS)
    assert cumulative(graph.get("n")) == (CR | W, ALL & ~RS)
    await graph.detach_root(edge)
    assert cumulative(graph.get("n")) == (NONE, ALL)


async def test_a_window_does_not_let_others_resize(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add({"driver": "raw", "node-name": "r", "file": "n", "size": 4096})
    with pytest.raises(BlockError, match="permissions 'resize' are both required by a resize"):
        await graph.resize(graph.get("n"), 1 << 20)


async def test_conflict_names_both_users(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add(format_node("f", file="n"))
    with pytest.raises(BlockError) as info:
        await graph.attach_root("block export 'e'", graph.get("n"), CR | W, ALL)
    assert str(info.value) == (
        "Permission conflict on node 'n': permissions 'write' are both required by block export 'e'"
        " (uses node 'n' as 'root' child) and unshared by node 'f' (uses node 'n' as 'file' child)."
    )
    assert len(graph.get("n").parents) == 1


async def test_conflict_with_what_a_new_user_does_not_share(graph: Graph) -> None:
    await graph.add(null("n"))
    first = await graph.attach_root("the writer", graph.get("n"), W, ALL)
    with pytest.raises(BlockError, match=r"required by the writer .* and unshared by node 'f'"):
        await graph.add(format_node("f", file="n"))
    assert sorted(graph.nodes) == ["n"]
    await graph.detach_root(first)


async def test_a_conflict_deep_below_is_found(graph: Graph) -> None:
    await graph.add(null("n"))
    await graph.add({"driver": "raw", "node-name": "r", "file": "n"})
    await graph.add({"driver": "raw", "node-name": "s", "file": "r"})
    quiet = await graph.attach_root("the reader", graph.get("n"), CR, CR)
    with pytest.raises(BlockError, match=r"node 'n'.* required by node 'r' .* unshared by the reader"):
        await graph.attach_root("the writer", graph.get("s"), CR | W, ALL)
    # Nothing of the refused change is in force.
    assert cumulative(graph.get("r")) == (NONE, ALL)
    await graph.detach_root(quiet)
    await graph.detach_root(await graph.attach_root("the writer", graph.get("s"), CR | W, ALL))


async def test_two_children_below_one_user_may_conflict(graph: Graph) -> None:
    await graph.add(null("n"))
    with pytest.raises(BlockError, match="Permission conflict on node 'n'"):
        await graph.add(format_node("f", file="n", backing=format_node("b", file="n")))
    assert sorted(graph.nodes) == ["n"]


async def test_read_only_nodes_cannot_be_written(graph: Graph) -> None:
    node = await graph.add(null("n", **{"read-only": True}))
    with pytest.raises(BlockError, match="node 'n': Block node is read-only"):
        await graph.attach_root("a user", node, W, ALL)


async def test_a_read_only_format_shares_reading(graph: Graph) -> None:
    await graph.add(null("n"))
    for name in ("f", "g"):
        await graph.add(format_node(name, file="n", **{"read-only": True}))
    assert cumulative(graph.get("n")) == (CR, CR | WU)


async def test_force_share_shares_all(graph: Graph, scratch: Path) -> None:
    (scratch / "disk").write_bytes(bytes(4096))
    file = {"driver": "file", "filename": str(scratch / "disk")}
    flags = {"read-only": True, "force-share": True}
    node = await graph.add(format_node("f", file=file, **flags))
    assert cumulative(node.children["file"].node) == (CR, ALL)
    with pytest.raises(BlockError, match="force-share=on can only be used with read-only images"):
        await graph.add({**file, "node-name": "g", "force-share": True})
