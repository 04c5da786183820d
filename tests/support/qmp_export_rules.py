# SPDX-License-Identifier: Apache-2.0
"""Rules of the stateful test: servers, exports, and clients that hold them open and use them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.support.qmp_machine import Base, booleans


class ExportRules(Base):
    """Each rule is a kind of command, or something that a client does."""

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

    @rule(data=st.data())
    def add_export_for_a_guest(self, data: Any) -> None:
        id = data.draw(st.sampled_from(["x", "v"]))
        address = {"type": "unix", "path": f"{id}.sock"}
        options = {"type": "vhost-user-blk", "id": id, "node-name": self.a_node(data), "addr": address}
        if data.draw(booleans):
            options["writable"] = data.draw(booleans)
        self.do("block-export-add", options)

    # ---- clients ----

    @rule(data=st.data())
    def client_comes(self, data: Any) -> None:
        exports = self.model.state.exports
        known = sorted(id for id, export in exports.items() if export.type == "nbd")
        if known:
            id = data.draw(st.sampled_from(known))
            self.history.append(f"a client of {id}")
            self.clients.connect(id, exports[id].name)
            self._count(id, 1)

    @rule(data=st.data())
    def client_goes(self, data: Any) -> None:
        if self.clients.attached:
            client = data.draw(st.sampled_from(self.clients.attached))
            self.history.append(f"no client of {client.id}")
            self.clients.disconnect(client)
            self._count(client.id, -1)

    def _count(self, id: str, by: int) -> None:
        for model in (self.model, self.our_model):
            model.state.exports[id].clients += by

    @rule(data=st.data())
    def client_works(self, data: Any) -> None:
        """It writes, reads back what the other program's client reads, or flushes."""
        if not self.clients.attached:
            return
        client = data.draw(st.sampled_from(self.clients.attached))
        state = self.model.state
        export = state.exports[client.id]
        length = 512 * data.draw(st.integers(1, 200))
        offset = 512 * data.draw(st.integers(0, 8191))
        byte = data.draw(st.integers(0, 255))
        if offset + length > client.size:
            return
        writable = export.writable and state.writable(export.node)
        match data.draw(st.sampled_from(["write", "write", "zeroes", "flush", "read", "read"])):
            case "write" if writable:
                found = self.clients.do(client, lambda each: each.write(offset, bytes([byte]) * length))
            case "zeroes" if writable:
                found = self.clients.do(client, lambda each: each.write_zeroes(offset, length))
            case "read" if state.readable(export.node):
                found = self.clients.do(client, lambda each: each.read(offset, length))
            case _:
                found = self.clients.do(client, lambda each: each.flush())
        self.history.append(f"a client of {client.id} at {offset}+{length}")
        assert found[0] == found[1], (client.id, offset, length, found)
