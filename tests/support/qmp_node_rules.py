# SPDX-License-Identifier: Apache-2.0
"""Rules of the stateful test: nodes are added, changed and removed. Arguments are mostly right."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.support.qmp_machine import FILES, MIB, Base, booleans
from tests.support.qmp_pair import Json


class NodeRules(Base):
    """Each rule is a kind of command."""

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
    def add_filter(self, data: Any) -> None:
        driver = data.draw(st.sampled_from(["throttle", "copy-on-read"]))
        options = {
            "driver": driver,
            "node-name": self.a_name(data),
            "file": self.a_child(data, ["r0", "r1"]),
            **self.generic(data),
        }
        if driver == "throttle":
            options["throttle-group"] = data.draw(st.sampled_from(["tg0", "tg1", "nothing"]))
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
                    other = {"file": {"filename": "r1"}, "throttle": {"throttle-group": "tg1"}}
                    options |= other.get(node.driver, {"size": 512})
            case 6:
                options["detect-zeroes"] = data.draw(st.sampled_from(["off", "on", "unmap"]))
        if node.driver == "qcow2" and "size" in options:
            del options["size"]
        return options
