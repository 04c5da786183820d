# SPDX-License-Identifier: Apache-2.0
"""snapshot-access: what the ``file`` of a copy-before-write node held when that node was opened.

Reads run in the datapath, from where the data are: copied to the target, or still in place. A discard says
that a part is not needed any more: it is not copied then, and gone.
"""

from __future__ import annotations

import errno
import os

from target.datapath import Fault, Object, Op
from target.datapath.fence import make_view
from target.drivers.filter.copy_before_write import CopyBeforeWrite
from target.graph.node import BlockdevRef, Node, NodeOptions
from target.graph.permissions import Perm


class SnapshotAccess(Node, driver="snapshot-access"):
    """Several may read one snapshot."""

    named_as_file = True

    class Options(NodeOptions):
        file: BlockdevRef

    options: Options
    filter: CopyBeforeWrite

    async def open(self) -> None:
        child = await self.attach("file", self.options.file, perm=Perm.NONE, shared=Perm.ALL)
        if not isinstance(child, CopyBeforeWrite):
            raise self.error(f"node '{child.name}' (driver '{child.driver}') gives no access to a snapshot")
        self.children["file"].frozen += 1
        self.filter = child

    def make_object(self) -> Object:
        size = self.filter.snapshot_size
        return make_view(self.datapath, self.filter.fence, size, self._change)

    async def _change(self, fault: Fault) -> None:
        if fault.op is not Op.DISCARD:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        await self.filter.forget(fault.offset, fault.length)
        fault.done()
