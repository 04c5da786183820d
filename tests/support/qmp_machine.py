# SPDX-License-Identifier: Apache-2.0
"""Commands on qemu-storage-daemon, on ours and on the model, and what the rules of the test choose from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from tests.support.qmp_clients import Clients
from tests.support.qmp_differences import same_error
from tests.support.qmp_model import Model
from tests.support.qmp_outline import differing, outline, outline_of
from tests.support.qmp_pair import Json, Pair, graph_of
from tests.support.qmp_state import OURS, File, Policy
from tests.support.tools import create_image

MIB = 1 << 20

FILES = {
    "r0": File("raw", 4 * MIB),
    "r1": File("raw", MIB),
    "q0": File("qcow2", 4 * MIB),
    "q1": File("qcow2", 2 * MIB),
    "o0": File("qcow2", 4 * MIB, "q0"),
}
NAMES = ["a", "b", "c", "d", "e", "f"]
BAD_NAMES = ["", "9", "#block000", "x" * 32, "a/b", "nobody"]
booleans = st.booleans()


def make_images(directory: Path) -> None:
    for name, file in FILES.items():
        path = directory / name
        if file.backing is None:
            create_image(path, str(file.size), format=file.format)
    for name, file in FILES.items():
        if file.backing is not None:
            create_image(directory / name, str(file.size), backing=Path(file.backing))


def one_of(data: Any, values: list[str]) -> str:
    found: str = data.draw(st.sampled_from(values))
    return found


class Base(RuleBasedStateMachine):
    """Without rules."""

    images: Path

    def __init__(self) -> None:
        super().__init__()
        self.history: list[str] = []
        self.number = 0  # of files that snapshots have made
        self.model, self.our_model = Model(FILES, Policy()), Model(FILES, OURS)
        self.pair = Pair(self.images)
        self.clients = Clients(self.pair)

    def teardown(self) -> None:
        try:
            try:
                self.clients.close()
            finally:
                self.pair.stop()
        except AssertionError as error:
            raise AssertionError("\n".join([*self.history, str(error)])) from None

    # ---- the three together ----

    def do(self, command: str, arguments: Json, modelled: Json | None = None) -> None:
        """modelled: the arguments for the model, where they differ."""
        self._note(f"{command} {arguments}")
        given = arguments if modelled is None else modelled
        refused, our_refused = self.model.run(command, given), self.our_model.run(command, given)
        if (refused is None) != (our_refused is None) or self._models_part():
            note(f"   not run: peer {refused}, ours {our_refused}")
            self.model.take_back()
            self.our_model.take_back()
            return
        peer, ours = self.pair.run(command, arguments)
        note(f"   peer {peer}\n   ours {ours}\n   model {refused}")
        where = f"{command} {arguments}:\n  peer: {peer}\n  ours: {ours}\n  model: {refused}"
        assert (peer.error is None) == (refused is None), f"the model is wrong: {where}"
        assert (peer.error is None) == (ours.error is None), where
        assert refused != our_refused or same_error(command, peer, ours), where
        self.after(where, [] if refused else self.model.state.removed)

    def do_together(self, actions: list[tuple[str, Json]], abort: Json | None) -> None:
        """One transaction here, and the same commands one after the other there. abort: ends the transaction,
        which then leaves everything as it was, as does one that is refused.
        """
        given = [{"type": command, "data": arguments} for command, arguments in actions]
        if abort is not None:
            given.append({"type": "abort", "data": abort})
        self._note(f"together {given}")
        before = copy.deepcopy(self.model.state)
        our_refused = self.our_model.run("transaction", {"actions": given})
        refused, removed = None, []
        for command, arguments in actions if our_refused is None else ():
            refused = refused or self.model.run(command, arguments)
            removed += self.model.state.removed
        if refused is not None or self._models_part():
            note(f"   not run: peer {refused}, ours {our_refused}")
            self.model.state = before
            self.our_model.take_back()
            return
        ours = self.pair.ours.run("transaction", {"actions": given})
        where = f"together {given}:\n  ours: {ours}\n  model: {our_refused}"
        assert (ours.error is None) == (our_refused is None), where
        for command, arguments in actions if our_refused is None else ():
            peer = self.pair.peer.run(command, arguments)
            assert peer.error is None, f"the model is wrong: {command} {arguments}: {peer}"
        self.after(where, removed)

    def _note(self, what: str) -> None:
        note(what)
        self.history.append(what)

    def _models_part(self) -> bool:
        """They differ on purpose, and would go on differently."""
        ours, theirs = self.our_model.state, self.model.state
        return [*ours.nodes] != [*theirs.nodes] or [*ours.exports] != [*theirs.exports]

    def after(self, where: str, removed: list[str]) -> None:
        """A command has been run by both, and has removed these exports."""
        for id in removed:
            self.pair.wait_deleted(id)
            self.clients.cut(id)
        self.compare_graphs(where)

    def compare_graphs(self, where: str) -> None:
        peer, ours = graph_of(self.pair.peer), graph_of(self.pair.ours)
        for name in self.model.state.nodes:
            if self.model.state.content(name) == "qcow2":  # how an image file grows is each one's affair
                for graph in (peer, ours):
                    graph["nodes"].get(name, {}).pop("virtual-size", None)
        for name in ("nodes", "exports"):
            assert peer[name] == ours[name], f"{where}\n{differing(peer[name], ours[name])}"
        for graph, model in ((peer, self.model), (ours, self.our_model)):
            found, expected = outline(graph), outline_of(model)
            assert found == expected, f"the model is wrong: {where}\n{differing(found, expected)}"

    # ---- what rules choose from ----

    def a_node(self, data: Any, *, sometimes_bad: bool = True) -> str:
        known = sorted(name for name in self.model.state.nodes if "/" not in name)
        bad = data.draw(st.integers(0, 9)) == 0 if sometimes_bad else False
        if bad or not known:
            return one_of(data, BAD_NAMES[1:] + NAMES)
        return one_of(data, known)

    def a_name(self, data: Any) -> str:
        free = [name for name in NAMES if name not in self.model.state.nodes]
        bad = data.draw(st.integers(0, 9)) == 0
        return one_of(data, BAD_NAMES + NAMES if bad or not free else free)

    def generic(self, data: Any) -> Json:
        found: Json = {}
        if data.draw(st.integers(0, 2)) == 0:
            found["read-only"] = data.draw(booleans)
        if data.draw(st.integers(0, 4)) == 0:
            found["discard"] = data.draw(st.sampled_from(["unmap", "ignore"]))
        if data.draw(st.integers(0, 6)) == 0:
            found["detect-zeroes"] = data.draw(st.sampled_from(["off", "on", "unmap"]))
        return found

    def a_child(self, data: Any, files: list[str]) -> str | Json:
        match data.draw(st.integers(0, 3)):
            case 0 | 1:
                return self.a_node(data)
            case _:
                return {"driver": "file", "filename": data.draw(st.sampled_from(files))}
