# SPDX-License-Identifier: Apache-2.0
"""null-co and null-aio: a disk that forgets what is written. For measurements and tests."""

from __future__ import annotations

from target.config.options import Size, Unsigned
from target.datapath import Object
from target.graph.node import Node, NodeOptions

DEFAULT_SIZE = 1 << 30


class Null(Node, driver="null-co", aliases=("null-aio",)):
    """Reads give zeros with ``read-zeroes``, else whatever the buffer held."""

    is_protocol = True
    may_be_inactive = True
    tuning = frozenset({"latency_ns"})
    reopenable = frozenset({"read-only", "cache"})

    class Options(NodeOptions):
        size: Size = DEFAULT_SIZE
        latency_ns: Unsigned = 0
        read_zeroes: bool = False

    options: Options

    async def open(self) -> None:
        return None

    @property
    def filename(self) -> str | None:
        options = self.options
        default = options.size == DEFAULT_SIZE and not options.read_zeroes
        return f"{self.driver}://" if default else None

    async def allocated_size(self) -> int:
        return 0

    def make_object(self) -> Object:
        options = self.options
        return self.datapath.null(options.size, options.latency_ns, options.read_zeroes)
