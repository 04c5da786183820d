# SPDX-License-Identifier: Apache-2.0
"""The node: options, what the plugin can do, and the object through which requests reach it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from target.config.options import Unsigned
from target.datapath import Fault, Object, Op
from target.drivers.protocol.nbdkit_plugin import life, process
from target.graph.node import Features, Node, NodeOptions
from target.nbdkit import wire

THREADS_MAX = wire.SLOTS


class NbdkitPlugin(Node, driver="nbdkit-plugin"):
    """A plugin in a process of its own. One node is one connection: ``open`` to ``close`` of the plugin."""

    is_protocol = True

    class Options(NodeOptions):
        """config: parameters for the plugin in their order, a mapping, "key=value", or a list of such.
        export: the name that a client of nbdkit would ask for. close-timeout: seconds that the plugin has to
        finish and to close, before its process is ended."""

        script: str
        config: dict[str, Any] | list[Any] | str = msgspec.field(default_factory=list)
        export: str = ""
        python: str = ""
        threads: Annotated[int, msgspec.Meta(ge=1, le=THREADS_MAX)] = 16
        restart: Literal["never", "on-failure"] = "never"
        close_timeout: Unsigned = 10
        verbose: bool = False

    options: Options
    plugin: life.Plugin | None = None
    upcall: Object | None = None

    async def open(self) -> None:
        options = self.options
        setup = process.Setup(
            script=options.script,
            config=self._config(),
            export=options.export,
            readonly=self.read_only,
            threads=options.threads,
            verbose=options.verbose,
        )
        python = options.python or process.default_python()
        self.plugin = life.Plugin(self.label, python, setup, options.restart, options.close_timeout)
        try:
            await self.plugin.open()
        except process.StartError as error:
            raise self.error(str(error)) from None
        self._check(self.plugin.opened)
        self.features = features(self.plugin.opened)

    def _check(self, opened: process.Opened) -> None:
        if not opened.can_write and not self.read_only:
            if self.options.read_only is False and not self.settings.auto_read_only:
                raise self.error("the plugin is read-only, and read-only=off does not allow that")
            self.read_only = True
        if opened.minimum > 1 and opened.size % opened.minimum:
            raise self.error(
                f"the plugin's size, {opened.size} bytes, is not a multiple of its minimum block size, "
                f"{opened.minimum}"
            )

    async def close(self) -> None:
        plugin, self.plugin = self.plugin, None
        if plugin is not None:
            await plugin.close()
        if self.upcall is not None and self.upcall is not getattr(self, "object", None):
            self.upcall.release()

    def interrupt(self) -> None:
        if self.plugin is not None:
            self.plugin.interrupt()

    def make_object(self) -> Object:
        assert self.plugin is not None
        opened = self.plugin.opened
        self.upcall = self.datapath.upcall(opened.size, self._submit, takes_fua=True)
        return self.upcall if opened.minimum <= 1 else self.datapath.align(self.upcall, opened.minimum)

    def _submit(self, fault: Fault) -> None:
        if fault.op is Op.FLUSH and self.settings.no_flush:
            fault.done()
            return
        assert self.plugin is not None
        self.plugin.submit(fault)

    def counters(self) -> dict[str, Any]:
        if self.plugin is None:
            return super().counters()
        plugin = {"restarts": self.plugin.restarts, **process.described(self.plugin.opened)}
        return {**super().counters(), "plugin": plugin}

    # ---- config ----

    def _config(self) -> list[tuple[str, str]]:
        given = self.options.config
        pairs: list[tuple[str, str]] = []
        for item in given if isinstance(given, list) else [given]:
            pairs += self._pairs(item)
        return pairs

    def _pairs(self, item: Any) -> list[tuple[str, str]]:
        if isinstance(item, dict):
            return [(self._key(key), self._value(key, value)) for key, value in item.items()]
        if isinstance(item, str) and "=" in item:
            key, _, value = item.partition("=")
            return [(self._key(key), value)]
        raise self.error(f"option 'config': expects key=value, not {item!r}")

    def _key(self, key: Any) -> str:
        if not isinstance(key, str) or not key or "\0" in key:
            raise self.error(f"option 'config': {key!r} is not a key")
        if key == "script":
            raise self.error("option 'config': 'script' is an option of the node")
        return key

    def _value(self, key: str, value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str | int | float) and "\0" not in str(value):
            return str(value)
        raise self.error(f"option 'config': the value of '{key}' has to be a string, not {value!r}")


def features(opened: process.Opened) -> Features:
    """What nbdkit would tell its clients."""
    return Features(
        flush=opened.can_flush,
        fua=opened.can_fua > 0,
        trim=opened.can_trim,
        fast_zero=opened.can_fast_zero,
        cache=opened.can_cache > 0,
        multi_conn=opened.can_multi_conn and opened.thread_model > 0,
        rotational=opened.is_rotational,
        description=opened.description,
    )
