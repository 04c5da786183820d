# SPDX-License-Identifier: Apache-2.0
"""Random sequences of commands on qemu-storage-daemon, on ours, and on a model: all three agree.

They agree on which commands succeed, on the text of each error (but for REVIEWED below), and after each step
on the graph: nodes, sizes, permissions of each edge, exports. BLOCKTARGET_STATEFUL multiplies the examples:
    BLOCKTARGET_STATEFUL=20 scripts/test tests/interop/test_qmp_stateful.py
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.support.qmp_model import OURS, WORDS, File, Model, Policy
from tests.support.qmp_pair import Answer, Json, Pair, graph_of, plain
from tests.support.tools import create_image

MULTIPLE = int(os.environ.get("BLOCKTARGET_STATEFUL", "1"))
EXAMPLES = 40
STEPS = 40
MIB = 1 << 20


class Difference(NamedTuple):
    """An error that both programs give, each in its words, and why ours are better than theirs."""

    command: str
    peer: str  # regular expressions
    ours: str
    why: str


_PERMISSIONS = r"Permission conflict|Block node is read-only|Failed to get .* lock"
_OTHER_FIRST = "two things are wrong, and the other is found first"

REVIEWED = [
    Difference("", r"(The sum of o|O)ffset .*", r"Specified size is not multiple of 512", _OTHER_FIRST),
    Difference("blockdev-snapshot", r"Making .*|The overlay .*", r"The overlay is .* in use", _OTHER_FIRST),
    # Of two nodes that are reopened, both wrongly.
    Difference("blockdev-reopen", r"Failed to find node with .*", r".*", _OTHER_FIRST),
    Difference("blockdev-reopen", r"Cannot find .*", r"(Cannot change|backing is missing) .*", _OTHER_FIRST),
    Difference("blockdev-add", r".*", r"setting detect-zeroes to unmap is not allowed .*", _OTHER_FIRST),
    Difference("blockdev-add", r".*", r"(Duplicate nodes with|Invalid|Node name too) .*", _OTHER_FIRST),
    Difference("blockdev-add", _PERMISSIONS, r".* qcow2 .*", _OTHER_FIRST),
    Difference("blockdev-add", _PERMISSIONS, _PERMISSIONS, _OTHER_FIRST),
    Difference(
        "blockdev-add", r"Making '.*' a .* would create a cycle", r"Cannot find .*", "it is not there yet"
    ),
    Difference(
        "", r"Image is not in qcow2 format", r"the file is too short for a qcow2 header.*", "says why"
    ),
]

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


class Machine(RuleBasedStateMachine):
    """Each rule is a kind of command, with arguments that are mostly right."""

    images: Path

    def __init__(self) -> None:
        super().__init__()
        self.history: list[str] = []
        self.pair = Pair(self.images)
        self.model, self.our_model = Model(FILES, Policy()), Model(FILES, OURS)

    def teardown(self) -> None:
        try:
            self.pair.stop()
        except AssertionError as error:
            raise AssertionError("\n".join([*self.history, str(error)])) from None

    # ---- the three together ----

    def do(self, command: str, arguments: Json, modelled: Json | None = None) -> None:
        """modelled: the arguments for the model, where they differ."""
        note(f"{command} {arguments}")
        self.history.append(f"{command} {arguments}")
        given = arguments if modelled is None else modelled
        refused, our_refused = self.model.run(command, given), self.our_model.run(command, given)
        if (refused is None) != (our_refused is None):  # they differ on purpose, and would go on differently
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

    # ---- nodes ----

    @rule(data=st.data())
    def add_null(self, data: Any) -> None:
        options = {"driver": "null-co", "node-name": self.a_name(data), **self.generic(data)}
        if data.draw(booleans):
            options["size"] = data.draw(st.sampled_from([0, 512, MIB, MIB + 512, 4 * MIB]))
        self.do("blockdev-add", options)

    @rule(data=st.data())
    def add_file(self, data: Any) -> None:
        name = data.draw(st.sampled_from([*FILES, "r0", "r1", "nothing"]))
        options = {"driver": "file", "node-name": self.a_name(data), "filename": name, **self.generic(data)}
        self.do("blockdev-add", options)

    @rule(data=st.data())
    def add_raw(self, data: Any) -> None:
        options = {
            "driver": "raw",
            "node-name": self.a_name(data),
            "file": self.a_child(data, ["r0", "r1"]),
            **self.generic(data),
        }
        # How large a qcow2 file is the model does not know.
        child = self.model.state.nodes.get(str(options["file"]))
        known = child is None or self.model.state.content(child.key) == "raw"
        for name in ("offset", "size") if known else ():
            if data.draw(st.integers(0, 3)) == 0:
                sizes = [512, 65536, 2 * MIB, 8 * MIB] + [1000] * (name == "size")
                options[name] = data.draw(st.sampled_from(sizes))
        self.do("blockdev-add", options)

    @rule(data=st.data())
    def add_qcow2(self, data: Any) -> None:
        options = {
            "driver": "qcow2",
            "node-name": self.a_name(data),
            "file": self.a_child(data, ["q0", "q1", "o0"]),
            **self.generic(data),
        }
        match data.draw(st.integers(0, 3)):
            case 0:
                options["backing"] = self.a_node(data)
            case 1 | 2:
                options["backing"] = None
        self.do("blockdev-add", options)

    @rule(data=st.data())
    def add_without_name(self, data: Any) -> None:
        self.do("blockdev-add", {"driver": "null-co"})

    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        self.do("blockdev-del", {"node-name": self.a_node(data)})

    @rule(data=st.data())
    def resize(self, data: Any) -> None:
        size = data.draw(st.sampled_from([-1, 0, 512, 1000, MIB, 2 * MIB, 8 * MIB]))
        name = self.a_node(data)
        if (
            name not in self.model.state.nodes or self.model.state.content(name) != "qcow2"
        ):  # it would be destroyed
            self.do("block_resize", {"node-name": name, "size": size})

    @rule(data=st.data())
    def threshold(self, data: Any) -> None:
        size = data.draw(st.sampled_from([0, 512, MIB]))
        self.do("block-set-write-threshold", {"node-name": self.a_node(data), "write-threshold": size})

    @rule(data=st.data())
    def reopen(self, data: Any) -> None:
        count = data.draw(st.sampled_from([1, 1, 1, 2]))
        options = {
            str(found["node-name"]): found for found in (self.changed_options(data) for _ in range(count))
        }
        self.do("blockdev-reopen", {"options": list(options.values())})

    def changed_options(self, data: Any) -> Json:
        node = self.model.state.nodes.get(self.a_node(data))
        if node is None:
            return {"driver": "null-co", "node-name": "nobody"}
        options = dict(node.options)
        match data.draw(st.integers(0, 6)):
            case 0 | 1 | 2:
                options["read-only"] = data.draw(booleans)
            case 3 if "file" in options:
                options["file"] = self.a_node(data)
            case 4 if "backing" in options:
                options["backing"] = data.draw(st.sampled_from([None, self.a_node(data)]))
            case 5:
                # The peer forgets the permissions of a raw node that becomes a window by this.
                if node.driver != "raw" or {"offset", "size"} & set(options):
                    options |= {"filename": "r1"} if node.driver == "file" else {"size": 512}
            case 6:
                options["detect-zeroes"] = data.draw(st.sampled_from(["off", "on", "unmap"]))
        if node.driver == "qcow2" and "size" in options:
            del options["size"]
        return options

    @rule(data=st.data())
    def snapshot(self, data: Any) -> None:
        self.do("blockdev-snapshot", {"node": self.a_node(data), "overlay": self.a_node(data)})

    # ---- exports ----

    @rule()
    def start_server(self) -> None:
        address = {"type": "unix", "data": {"path": "nbd"}}
        self.do("nbd-server-start", {"addr": address}, {})

    @rule(data=st.data())
    def stop_server(self, data: Any) -> None:
        if data.draw(st.integers(0, 3)) == 0:
            self.do("nbd-server-stop", {})

    @rule(data=st.data())
    def add_export(self, data: Any) -> None:
        id = data.draw(st.sampled_from(["x", "y", "z", "9"]))
        options = {"type": "nbd", "id": id, "node-name": self.a_node(data)}
        if data.draw(booleans):
            options["name"] = data.draw(st.sampled_from(["n", "m", "o", "p"]))
        if data.draw(booleans):
            options["writable"] = data.draw(booleans)
        self.do("block-export-add", options)

    @rule(data=st.data())
    def add_export_the_old_way(self, data: Any) -> None:
        options = {"device": self.a_node(data)}
        if data.draw(booleans):
            options["name"] = data.draw(st.sampled_from(["x", "n"]))
        if data.draw(booleans):
            options["writable"] = data.draw(booleans)
        self.do("nbd-server-add", options)

    @rule(data=st.data())
    def remove_export(self, data: Any) -> None:
        id = data.draw(st.sampled_from(sorted({*self.model.state.exports, "x"})))
        mode = data.draw(st.sampled_from(["safe", "hard"]))
        command, key = data.draw(st.sampled_from([("block-export-del", "id"), ("nbd-server-remove", "name")]))
        self.do(command, {key: id, "mode": mode})


def same_error(command: str, peer: Answer, ours: Answer) -> bool:
    if peer.error is None or ours.error is None:
        return True
    if peer.error[0] != ours.error[0]:
        return False
    theirs, own = plain(peer.error[1]), plain(ours.error[1])
    return theirs == own or any(
        difference.command in ("", command)
        and re.fullmatch(difference.peer, theirs)
        and re.fullmatch(difference.ours, own)
        for difference in REVIEWED
    )


def outline(graph: Json) -> Json:
    """Of a program's graph, what the model knows."""
    return {
        "nodes": {name: [node["drv"], node["ro"]] for name, node in graph["nodes"].items()},
        "edges": graph["edges"],
        "exports": {id: export[1] for id, export in graph["exports"].items()},
    }


def outline_of(model: Model) -> Json:
    state = model.state
    edges = [
        ["backend" if use.role == "root" else use.user, use.role, use.node, words(perm), words(shared)]
        for use, (perm, shared) in state.permissions().items()
    ]
    return {
        "nodes": {node.key: [node.driver, node.read_only] for node in state.nodes.values()},
        "edges": sorted(edges),
        "exports": {id: export.node for id, export in state.exports.items()},
    }


def words(perm: int) -> list[str]:
    return sorted(word for bit, word in WORDS.items() if perm & bit)


def differing(a: Any, b: Any, where: str = "") -> str:
    """Where two values differ, one place a line."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return "".join(differing(a.get(key), b.get(key), f"{where}.{key}") for key in keys)
    return "" if a == b else f"{where}:\n  {a}\n  {b}\n"


@pytest.mark.timeout(180 * MULTIPLE)
def test_commands_agree_with_the_peer_and_the_model() -> None:
    with tempfile.TemporaryDirectory() as directory:
        make_images(Path(directory))
        Machine.images = Path(directory)
        run = settings(
            max_examples=EXAMPLES * MULTIPLE,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=MULTIPLE == 1,  # always the same ones in CI, others each time in a longer run
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        case = Machine.TestCase
        case.settings = run
        case().runTest()
