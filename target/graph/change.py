# SPDX-License-Identifier: Apache-2.0
"""One change of the graph, all or nothing, while clients use it.

Each step takes effect at once and says how it is undone; when a later step fails, all are undone in reverse
order. What cannot be undone (closing files, cutting them) waits until every step has succeeded. Requests are
held only above what is rewired, from the first rewiring to the end.

    async with graph.change() as change:
        node = await change.add(options)
        await change.replace_node(old, node)
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from target.graph.edge import Edge, RootEdge
from target.graph.errors import BlockError
from target.graph.options import BlockdevRef, NodeOptions, Settings
from target.graph.permissions import Perm
from target.graph.reopen import Reopen
from target.graph.update import PermissionUpdate, cumulative

if TYPE_CHECKING:
    from target.datapath import Object
    from target.graph.graph import Graph
    from target.graph.node import Node

log = logging.getLogger("blocktarget")

DRAIN_SECONDS = 30.0  # that requests have to finish before what needs them to is refused

Step = Callable[[], Awaitable[object] | object]


class Change:
    """See above. Made by ``Graph.change``, which holds the graph's lock meanwhile."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        # Whether users of a node may disagree until ``settle``: the way to a state that is right may lead
        # through some that are not.
        self.lenient = False
        self.failures: list[Exception] = []  # of what could not be undone any more
        self._undo: list[Step] = []
        self._later: list[Step] = []
        self._drained: list[RootEdge] = []
        self._quiet: list[Node] = []
        self._sizes: dict[RootEdge, None] = {}  # whose users have to hear of a new size
        self._bound: set[Node] = set()  # what an undo does something to: it has to be there then
        self._anew: dict[Node, Node] = {}  # what has been opened again by an undo
        self._touched: dict[Node, None] = {}  # whose locks may hold more than is needed now

    # ---- for drivers, exports and transactions ----

    def undo(self, step: Step) -> None:
        """Takes back what was just done, should a later step fail. It must not fail itself."""
        self._undo.append(step)

    def later(self, step: Step) -> None:
        """For what cannot be undone: done when all else has succeeded, and requests go on."""
        self._later.append(step)

    def bind(self, *nodes: Node) -> None:
        """What is about to be done to these nodes is undone on them: they cannot be closed before the end."""
        self._bound.update(nodes)

    # ---- nodes ----

    async def add(self, options: dict[str, Any] | BlockdevRef | NodeOptions, driver: str = "") -> Node:
        """Opens a node that stays until it is removed. NodeOptions need the driver's name beside them."""
        ref = self.graph.ref(options, driver)
        assert ref.options is not None
        if ref.options.node_name is None:
            raise BlockError("'node-name' must be specified for the root node")
        node = await self.graph.open(ref, Settings(), None)
        node.owned = True
        self.bind(node)

        async def close() -> None:
            node.owned = False
            await self.graph.collect(node)

        self.undo(close)
        return node

    def remove(self, name: str) -> None:
        """Takes out a node that was added, and inline children that only it used; they close at the end."""
        node = self._removable(name)
        node.owned = False

        def restore() -> None:
            node.owned = True

        self.undo(restore)
        self._leave(node)

    async def remove_now(self, name: str, options: BlockdevRef) -> None:
        """The same, but it closes now, so that another node can have its file; undone by opening it anew."""
        node = self._removable(name)
        if node.parents or not self._bound.isdisjoint(_leaving(node)):
            raise BlockError(f"Node {name} cannot be closed now: what was done before may have to be undone")
        node.owned = False

        async def open_again() -> None:
            self._anew[node] = await self.graph.open(options, Settings(), None)
            self._anew[node].owned = True

        self.undo(open_again)
        await self.graph.collect(node)

    def _removable(self, name: str) -> Node:
        node = self.graph.nodes.get(name)
        if node is None:
            raise BlockError(f"Failed to find node with node-name='{name}'")
        users = [edge for edge in node.parents if edge.parent is None or not edge.parent.leaving]
        names = ", ".join(f"{edge.user} as '{edge.name}' child" for edge in users)
        if any(edge.parent is None for edge in users):
            raise BlockError(f"Node {name} is in use: by {names}")
        refuse_backing(node)
        if not node.owned:
            raise BlockError(f"Node {name} is not owned by the monitor")
        if users:
            raise BlockError(f"Block device {name} is in use: by {names}")
        return node

    def _leave(self, node: Node) -> None:
        """Frees the names of what closes at the end when nobody uses it: another node may have them now."""
        leaving = [found for found in _leaving(node) if self.graph.nodes.get(found.name) is found]
        for found in leaving:
            del self.graph.nodes[found.name]
            found.leaving = True

        def restore() -> None:
            for found in leaving:
                self.graph.nodes[found.name] = found
                found.leaving = False

        async def close() -> None:
            await self.graph.collect(node)

        self.undo(restore)
        self.later(close)

    # ---- users outside the graph ----

    def attach_root(self, user: str, node: Node, perm: Perm, shared: Perm) -> RootEdge:
        """Gives a user outside the graph (named in messages) the use of a node, through a gate."""
        edge = RootEdge(user, node, perm, shared)
        front = node.object if node.active else node.front
        edge.gate = self.graph.datapath.gate(front, bool(perm & Perm.WRITE))
        edge.gate.size = node.size
        self.undo(lambda: self._release_gate(edge))
        self.insert(edge)
        self.undo(lambda: unlink(edge))
        return edge

    def _release_gate(self, edge: RootEdge) -> None:
        if edge in self._drained:
            self._drained.remove(edge)
            edge.let_go()
        edge.gate.release()

    def unlink_root(self, edge: RootEdge) -> None:
        """Ends the use, for permissions and topology. The user has drained its gate, and releases it."""
        self.take_out(edge)
        self.undo(lambda: self._link_root(edge))
        self._leave_if_unused(edge.node)

    def _link_root(self, edge: RootEdge) -> None:
        old = edge.node
        edge.node = self._anew.get(old, old)
        link(edge)
        if edge.node is not old:
            edge.relink(old.object, edge.node.object)

    # ---- rewiring ----

    async def replace(self, edge: Edge, node: Node) -> None:
        """The edge leads to another node from here on."""
        await self.replace_all([edge], node)

    async def replace_node(self, old: Node, new: Node, *, keep: Collection[Edge] = ()) -> None:
        """All users of old use new, but those kept, and new itself and what it is made of.

        A frozen user refuses; one that needs nothing of the node, such as snapshot-access, stays with it.
        """
        below = set(_below(new))
        tied = [edge for edge in old.parents if edge.frozen and edge.perm is Perm.NONE]
        edges = [edge for edge in old.parents if edge not in (*keep, *tied) and edge.parent not in below]
        await self.replace_all(edges, new)

    async def replace_all(self, edges: Iterable[Edge], node: Node) -> None:
        edges = [edge for edge in edges if edge.node is not node]
        for edge in edges:
            _check_frozen(edge)
            if edge.parent is not None and edge.parent in _below(node):
                name, user = node.name, edge.parent.name
                raise BlockError(f"Making '{name}' a {edge.name} child of '{user}' would create a cycle")
        await self._drain_edges(edges)
        old_nodes = [edge.node for edge in edges]
        for edge in edges:
            self._point(edge, node)
        self.refresh([*old_nodes, node, *(edge.parent for edge in edges if edge.parent is not None)])
        for edge, old in zip(edges, old_nodes, strict=True):
            if old.size != node.size:
                edge.resized()
                self.undo(edge.resized)
            self._leave_if_unused(old)

    def _point(self, edge: Edge, node: Node) -> None:
        old = edge.node
        self.bind(old, node)

        def point(to: Node) -> None:
            if edge.node is not to:
                edge.node.parents.remove(edge)
                before, edge.node = edge.node, to
                to.parents.append(edge)
                edge.relink(before.object, to.object)

        self.undo(lambda: point(old))  # first: relink may refuse half way
        point(node)

    async def attach(self, parent: Node, role: str, node: Node) -> Edge:
        """Makes node one more child of parent, which must have a place for it."""
        if parent in _below(node):
            raise BlockError(f"Making '{node.name}' a {role} child of '{parent.name}' would create a cycle")
        await self.drain(parent)
        self.bind(parent, node)
        edge = Edge(parent, role, node)
        self.insert(edge)
        self.undo(lambda: unlink(edge))
        parent.relink(role, None, node.object)
        self.undo(lambda: parent.relink(role, node.object, None))
        parent.child_resized(edge)
        return edge

    async def detach(self, edge: Edge) -> None:
        """Takes a child away from its parent."""
        parent = edge.parent
        assert parent is not None
        _check_frozen(edge)
        await self.drain(parent)
        node = edge.node
        self.bind(parent, node)
        parent.relink(edge.role, node.object, None)
        self.undo(lambda: parent.relink(edge.role, None, node.object))
        self.take_out(edge)
        self.undo(lambda: link(edge))
        self._leave_if_unused(node)

    async def replace_object(self, node: Node, made: Object) -> None:
        """A node has another datapath object, such as one over a new descriptor; all above it use that."""
        await self.drain(node)
        self.bind(node)
        old = node.object
        made.set_policy(node.settings.discard == "unmap", node.settings.detect_zeroes)

        def use(new: Object) -> None:
            new.succeed(node.object)
            before, node.object = node.object, new
            for edge in node.parents:
                edge.relink(before, new)

        async def release_old() -> None:
            await old.synchronize()
            old.release()

        async def release_made() -> None:
            use(old)
            await made.synchronize()
            made.release()

        self.undo(release_made)
        use(made)
        self.later(release_old)

    async def reopen(self, refs: Iterable[BlockdevRef]) -> None:
        """Gives nodes new options, as blockdev-reopen does."""
        await Reopen(self.graph).run(self, refs)

    def tell_size(self, edge: RootEdge) -> None:
        """A user's node has another size; the user hears of it at the end."""
        self._sizes[edge] = None

    async def make_read_only(self, node: Node) -> None:
        """The same options, but read-only, where the driver can and nobody writes to the node."""
        await Reopen(self.graph).make_read_only(self, node)

    async def resize(self, node: Node, size: int) -> None:
        """Changes the size of a node, if its users permit it, and tells them."""
        self.bind(*_below(node))
        followers = _followers(node)
        self._share_resize(followers, True)
        with self._strict():  # it is over before all have to agree
            edge = self.attach_root("a resize", node, Perm.RESIZE, Perm.ALL)
        self.later(lambda: self._release_gate(edge))
        self.undo(node.resized)
        if node.read_only:
            raise node.error("Image is read-only")
        if size < node.size:
            await self.drain(node)  # nobody may meet an end that is taken back
        await node.resize(self, size)
        self.take_out(edge)
        self.undo(lambda: link(edge))
        node.resized()
        self._share_resize(followers, False)

    def _share_resize(self, edges: list[RootEdge], share: bool) -> None:
        """Users who follow their node's size permit a resize that is ours, and no other."""

        def set_shared(share: bool) -> None:
            for edge in edges:
                assert edge.fixed is not None
                perm, shared = edge.fixed
                edge.fixed = perm, shared | Perm.RESIZE if share else shared & ~Perm.RESIZE

        self.undo(lambda: set_shared(not share))
        set_shared(share)
        self.refresh([edge.node for edge in edges], loosen=share)

    # ---- permissions ----

    def refresh(self, tops: Iterable[Node], loosen: bool = False) -> None:
        """The permissions below these nodes follow from the edges as they are. BlockError for a conflict."""
        update = PermissionUpdate(tops)
        self._touched.update(dict.fromkeys(update.nodes))
        update.run(loosen, check=not self.lenient)

    @contextlib.contextmanager
    def _strict(self) -> Iterator[None]:
        lenient, self.lenient = self.lenient, False
        try:
            yield
        finally:
            self.lenient = lenient

    def settle(self) -> None:
        """From here on all have to agree. BlockError names who does not."""
        self.lenient = False
        self.refresh([node for node in self._touched if not node.closed])

    def insert(self, edge: Edge) -> None:
        """Puts the edge in with its permissions, or leaves everything as it was.

        The undo is the caller's: a node that is being opened, or closed, takes its edges with it.
        """
        link(edge)
        try:
            self.refresh([edge.parent or edge.node])
        except BaseException:
            unlink(edge)
            raise

    def take_out(self, edge: Edge) -> None:
        """The opposite of ``insert``."""
        unlink(edge)
        self.refresh([edge.node], loosen=True)

    def _leave_if_unused(self, node: Node) -> None:
        if not node.parents and not node.owned:
            self._leave(node)

    # ---- holding requests ----

    async def drain(self, *nodes: Node) -> None:
        """Holds the requests of all users above these nodes to the end, and what nodes do by themselves."""
        above = _above(nodes)
        roots = [edge for node in above for edge in node.parents if isinstance(edge, RootEdge)]
        await self._drain_edges(roots)
        for node in above:
            if node not in self._quiet:
                self._quiet.append(node)  # first: one that fails half way is resumed, too
                await node.quiesce()

    async def _drain_edges(self, edges: Iterable[Edge]) -> None:
        edges = list(edges)
        parents = [edge.parent for edge in edges if edge.parent is not None]
        if parents:
            await self.drain(*parents)
        roots = [edge for edge in edges if isinstance(edge, RootEdge) and edge not in self._drained]
        results = await asyncio.gather(*map(self._hold, roots), return_exceptions=True)
        for edge, result in zip(roots, results, strict=True):
            if isinstance(result, TimeoutError):
                raise BlockError(
                    f"node '{edge.node.name}': requests of {edge.user} did not finish"
                    f" in {DRAIN_SECONDS:.0f} s"
                )
            if isinstance(result, BaseException):
                raise result

    def holds(self, edge: RootEdge) -> bool:
        """Whether this change holds the requests of that user, so that it is no use to wait for them."""
        return edge in self._drained

    async def _hold(self, edge: RootEdge) -> None:
        await edge.hold(DRAIN_SECONDS)
        self._drained.append(edge)

    def raise_failure(self) -> None:
        """For who wants to hear of what went wrong after the change was made."""
        if self.failures:
            raise self.failures[0]

    # ---- the end, called by the graph ----

    async def roll_back(self) -> None:
        """Undoes all steps, the last first. What an undo leaves for ``later`` is done when requests go on."""
        self._later.clear()
        while self._undo:
            await self._try(self._undo.pop())
        alive = [node for node in self._touched if not node.closed]
        PermissionUpdate(alive).run(loosen=True)
        await self._resume()
        await self._do_later()
        for failure in self.failures:
            log.error("while a change of the graph was undone: %s", failure)

    async def finish(self) -> None:
        """All steps have succeeded: requests go on, then what cannot be undone is done. Failures are kept."""
        self._undo.clear()
        for edge in self._sizes:
            if edge in edge.node.parents:
                await self._try(edge.take_size)
        await self._resume()
        await self._do_later()
        self._release_locks()

    async def _do_later(self) -> None:
        for step in self._later:
            await self._try(step)

    def _release_locks(self) -> None:
        for node in self._touched:
            if not node.closed:
                node.commit_permissions(*cumulative(node))
        self._touched.clear()

    async def _resume(self) -> None:
        try:
            self._release_locks()
            for node in self._quiet:
                if not node.closed:
                    await self._try(node.resume)
        finally:
            while self._drained:
                self._drained.pop().let_go()

    async def _try(self, step: Step) -> None:
        try:
            result = step()
            if inspect.isawaitable(result):
                await result
        except (BlockError, OSError) as error:
            self.failures.append(error)
        except Exception as error:  # a driver's bug must not keep the other steps from being done
            log.exception("a step of a change of the graph")
            self.failures.append(error)


def refuse_backing(node: Node) -> None:
    """Refuses what is not done to a node that is behind another, because its data is that one's, too."""
    for edge in node.parents:
        if edge.role == "backing" and edge.parent is not None and not edge.parent.leaving:
            overlay = edge.parent.name
            raise BlockError(f"Node '{node.name}' is busy: node is used as backing hd of '{overlay}'")


def link(edge: Edge) -> None:
    edge.node.parents.append(edge)
    if edge.parent is not None:
        edge.parent.children[edge.role] = edge


def unlink(edge: Edge) -> None:
    edge.node.parents.remove(edge)
    if edge.parent is not None:
        del edge.parent.children[edge.role]


def _above(nodes: Iterable[Node]) -> list[Node]:
    """These nodes and all that use them."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in found:
            found[node] = None
            for edge in node.parents:
                if edge.parent is not None:
                    visit(edge.parent)

    for node in nodes:
        visit(node)
    return list(found)


def _check_frozen(edge: Edge) -> None:
    if edge.frozen and edge.parent is not None:
        ends = f"from '{edge.parent.name}' to '{edge.node.name}'"
        raise BlockError(f"Cannot change frozen '{edge.name}' link {ends}")


def _followers(node: Node) -> list[RootEdge]:
    """Users of a node, of what it is made of or a part of, who follow its size without sharing a resize."""
    users = [edge for used in {*_above([node]), *_below(node)} for edge in used.parents]
    roots = [edge for edge in users if isinstance(edge, RootEdge) and edge.on_resize is not None]
    return [edge for edge in roots if edge.fixed is not None and Perm.RESIZE not in edge.fixed[1]]


def _below(top: Node) -> list[Node]:
    """This node and all that it is made of."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in found:
            found[node] = None
            for edge in node.children.values():
                visit(edge.node)

    visit(top)
    return list(found)


def _leaving(top: Node) -> list[Node]:
    """top, which nobody uses, and what only it keeps open."""
    leaving = [top]
    for node in leaving:
        for edge in node.children.values():
            child = edge.node
            gone = all(user.parent in leaving for user in child.parents)
            if gone and not child.owned and child not in leaving:
                leaving.append(child)
    return leaving
