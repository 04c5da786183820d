# SPDX-License-Identifier: Apache-2.0
"""Rules of the stateful test: snapshots, transactions that both programs know, and those only ours does."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.support.qmp_machine import MIB, Base, booleans
from tests.support.qmp_pair import Json


class TransactionRules(Base):
    """Each rule is a kind of transaction."""

    # ---- what both know ----

    @rule(data=st.data())
    def snapshot(self, data: Any) -> None:
        self.do("blockdev-snapshot", self._snapshot(data))

    @rule(data=st.data())
    def snapshot_to_a_new_file(self, data: Any) -> None:
        self.do("blockdev-snapshot-sync", self._snapshot_sync(data))

    @rule(data=st.data())
    def transaction(self, data: Any) -> None:
        actions = []
        for _ in range(data.draw(st.integers(1, 3))):
            match data.draw(st.integers(0, 7)):
                case 0:
                    actions.append({"type": "abort", "data": {}})
                case 1 | 2 | 3:
                    actions.append({"type": "blockdev-snapshot-sync", "data": self._snapshot_sync(data)})
                case _:
                    actions.append({"type": "blockdev-snapshot", "data": self._snapshot(data)})
        self.do("transaction", {"actions": actions})

    def _snapshot(self, data: Any) -> Json:
        return {"node": self.a_node(data), "overlay": self.a_node(data)}

    def _snapshot_sync(self, data: Any) -> Json:
        self.number += 1
        found: Json = {
            "node-name": self.a_node(data),
            "snapshot-node-name": self.a_name(data),
            "snapshot-file": f"s{self.number}",
        }
        if data.draw(st.integers(0, 4)) == 0:
            found |= {"mode": "existing", "snapshot-file": data.draw(st.sampled_from(["q0", "q1", "r0"]))}
        return found

    # ---- what only ours knows: the same commands one after the other there ----

    @rule(data=st.data())
    def together(self, data: Any) -> None:
        actions = [self._action(data) for _ in range(data.draw(st.integers(1, 4)))]
        abort = {"x-at": data.draw(st.sampled_from(["prepare", "commit"]))} if data.draw(booleans) else None
        self.do_together(actions, abort)

    def _action(self, data: Any) -> tuple[str, Json]:
        exports = sorted({*self.model.state.exports, "x"})
        match data.draw(st.integers(0, 6)):
            case 0:
                file = {"driver": "file", "filename": data.draw(st.sampled_from(["r0", "r1"]))}
                return "blockdev-add", {"driver": "raw", "node-name": self.a_name(data), "file": file}
            case 1:
                name = self.a_name(data)
                return "blockdev-add", {"driver": "raw", "node-name": name, "file": self.a_node(data)}
            case 2:
                return "blockdev-del", {"node-name": self.a_node(data)}
            case 3:
                node = self.model.state.nodes.get(self.a_node(data))
                options: Json = {"driver": "null-co", "node-name": "nobody"}
                options = dict(node.options) if node is not None else options
                return "blockdev-reopen", {"options": [options | {"read-only": data.draw(booleans)}]}
            case 4:
                node = self.model.state.nodes.get(self.a_node(data))
                if node is not None and self.model.state.content(node.key) != "qcow2":
                    size = data.draw(st.sampled_from([MIB, 2 * MIB, 8 * MIB]))
                    return "block_resize", {"node-name": node.key, "size": size}
                return "blockdev-snapshot", self._snapshot(data)
            case 5:
                id = data.draw(st.sampled_from(["x", "y", "z"]))
                return "block-export-add", {
                    "type": "nbd",
                    "id": id,
                    "name": id,
                    "node-name": self.a_node(data),
                }
            case _:
                mode = data.draw(st.sampled_from(["safe", "hard"]))
                return "block-export-del", {"id": data.draw(st.sampled_from(exports)), "mode": mode}
