# SPDX-License-Identifier: Apache-2.0
"""The driver: opens the device, sets the controller up, makes the datapath's object, and gives all back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
from typing import Any

from target.config.options import Size, Unsigned
from target.datapath import Object, ffi, lib
from target.datapath import check as checked
from target.drivers.protocol.nvme.admin import AdminQueue
from target.drivers.protocol.nvme.brake import Brake
from target.drivers.protocol.nvme.controller import Controller, QueuePlace
from target.drivers.protocol.nvme.errors import ControllerError
from target.drivers.protocol.nvme.hardware import DmaMemory, Hardware, as_dict
from target.drivers.protocol.nvme.identify import ControllerFacts, NamespaceFacts
from target.drivers.protocol.nvme.recovery import Recovery
from target.drivers.protocol.nvme.spec import EVENT_ERROR, EVENT_NOTICE, NOTICE_NAMESPACE
from target.graph.describe import BlockStatsSpecificNvme
from target.graph.node import Node, NodeOptions
from target.vfio.errors import VfioError

log = logging.getLogger("blocktarget")
DEPTH = 256
PAGES_SMALL, PAGES_LARGE = (
    544,
    1100,
)  # of a queue, for PRP lists and bounces; the second for the largest commands
SMALL_TRANSFER = 1 << 20
EVENT_PAUSE = 0.05  # seconds: a controller that has events without end does not take the loop


@dataclasses.dataclass(frozen=True)
class QueuePair:
    place: QueuePlace
    memory: DmaMemory
    pages: int


def _shown(facts: ControllerFacts | NamespaceFacts) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in dataclasses.asdict(facts).items()}


class Nvme(Node, driver="nvme"):
    """A namespace of the NVMe controller at a PCI address. The device is bound to vfio-pci."""

    is_protocol = True

    class Options(NodeOptions):
        device: str
        namespace: Unsigned
        queues: Unsigned = 0
        timeout: Unsigned = 30
        dma_limit: Size = 4 << 30

    options: Options
    tuning = frozenset({"queues", "timeout", "dma_limit"})
    hardware: Hardware | None = None
    controller: Controller | None = None
    recovery: Recovery | None = None
    device: Object | None = None
    brake: Brake
    facts: ControllerFacts
    namespace: NamespaceFacts
    session = 0
    _closing = False
    _released = False

    async def open(self) -> None:
        self._check_options()
        self.queues: list[QueuePair] = []
        self._events: asyncio.Task[None] | None = None
        try:
            await self._open()
        except (VfioError, ControllerError) as error:
            raise self.error(str(error)) from None

    def _check_options(self) -> None:
        options = self.options
        if self.settings.force_share and not self.read_only:
            raise self.error("force-share=on can only be used with read-only images")
        if not 0 < options.namespace < 1 << 32:
            raise self.error(f"option 'namespace': there is no namespace {options.namespace}")
        if options.queues > lib.BT_NVME_MAX_QUEUES:
            raise self.error(
                f"option 'queues': there can be {lib.BT_NVME_MAX_QUEUES} queues, not {options.queues}"
            )
        if not 0 < options.timeout <= 3600:
            raise self.error(f"option 'timeout': 1 to 3600 seconds, not {options.timeout}")

    async def _open(self) -> None:
        options = self.options
        wanted = options.queues or max(1, min(self.datapath.threads, lib.BT_NVME_MAX_QUEUES))
        self.hardware = hardware = Hardware(options.device)
        await hardware.open(self.datapath, wanted, options.dma_limit)
        memory = await hardware.dma.allocate(AdminQueue.PAGES * 4096)
        self.shares_interrupt = len(hardware.interrupts) == 1
        interrupt = None if self.shares_interrupt else hardware.interrupts[0]
        controller = Controller(hardware.registers, memory, interrupt, options.timeout)
        self.controller, self.brake = controller, Brake(controller, hardware)
        controller.admin.start()
        await controller.enable()
        self.facts = await controller.identify()
        self.namespace = await controller.namespace(options.namespace)
        self._check_writable()
        await self._make_queues(min(wanted, max(1, len(hardware.interrupts) - 1)))
        self.recovery = Recovery(
            self.label, self.datapath, controller, self.brake, self._restart, self._release_controller, log
        )

    def _check_writable(self) -> None:
        if self.namespace.write_protected and not self.read_only:
            if not self.settings.auto_read_only:
                raise self.error(f"namespace {self.namespace.identifier} is write protected")
            self.read_only = True

    # ---- queues ----

    async def _make_queues(self, wanted: int) -> None:
        """As many as the controller gives, one for each I/O thread at most."""
        assert self.controller is not None and self.hardware is not None
        transfer = self.facts.max_transfer
        pages = PAGES_SMALL if 0 < transfer <= SMALL_TRANSFER else PAGES_LARGE
        depth = min(DEPTH, self.controller.capabilities.queue_entries)
        layout = ffi.new("struct bt_nvme_layout *")
        checked(lib.bt_nvme_queue_layout(depth, pages, layout))
        threads = max(1, self.datapath.threads)
        count = await self.controller.set_queues(min(wanted, threads))
        self.controller.check_doorbells(count + 1)
        for number in range(1, count + 1):
            memory = await self.hardware.dma.allocate(layout.bytes)
            queues = memory.iova + layout.submission, memory.iova + layout.completion
            place = QueuePlace(number, depth, 0 if self.shares_interrupt else number, *queues)
            await self.controller.create_queue(place)
            self.queues.append(QueuePair(place, memory, pages))

    async def _restart(self) -> None:
        """Resets the controller and makes its queues again. ControllerError when that fails."""
        controller = self.controller
        assert controller is not None
        await controller.enable()
        if await controller.set_queues(len(self.queues)) < len(self.queues):
            raise ControllerError("the controller has fewer queues than before")
        for queue in self.queues:
            await controller.create_queue(queue.place)
        self._take(await controller.namespace(self.options.namespace))
        self._watch_events()

    def _take(self, namespace: NamespaceFacts) -> None:
        """The namespace as it is now: its size may have changed."""
        if namespace.block_size != self.namespace.block_size:
            raise ControllerError(f"namespace {namespace.identifier} has blocks of another size now")
        changed = namespace.size != self.namespace.size
        self.namespace = namespace
        if changed and self.device is not None:
            self.device.size = self.object.size = namespace.size
            self.resized()

    # ---- the datapath's object ----

    def make_object(self) -> Object:
        assert self.hardware is not None and self.recovery is not None
        options = self._device_options()
        queues = ffi.new("struct bt_nvme_queue[]", [self._queue(pair) for pair in self.queues])
        self.session = self.datapath.session(self.recovery.on_event)
        dma = self.hardware.dma.ptr
        arguments = (self.session, dma, options, queues, len(queues))
        device: Object = self.datapath.adopt(lambda tag: lib.bt_nvme_new(self.datapath.dp, tag, *arguments))
        self.device = device
        self.recovery.watch(device)
        self._watch_events()
        return self.datapath.align(device, self.namespace.block_size)

    def _device_options(self) -> Any:
        hardware, controller, facts, namespace = self.hardware, self.controller, self.facts, self.namespace
        assert hardware is not None and controller is not None
        options = ffi.new("struct bt_nvme_options *")
        options.nsid = namespace.identifier
        options.block_size = namespace.block_size
        options.size = namespace.size
        options.max_transfer = facts.max_transfer
        options.zeroes_bytes = facts.zeroes_bytes
        options.flags = self._flags()
        options.discard_ranges = facts.discard_ranges
        options.discard_range_bytes = facts.discard_range_blocks * namespace.block_size
        options.discard_bytes = min(facts.discard_blocks * namespace.block_size, (1 << 64) - 1)
        options.timeout_ns = self.options.timeout * 1_000_000_000
        options.registers = hardware.bar
        options.registers_length = hardware.bar_length
        options.stride = controller.capabilities.stride
        return options

    def _flags(self) -> int:
        facts, namespace = self.facts, self.namespace
        deallocates = namespace.zeroes_may_deallocate and namespace.zeros_when_deallocated
        present = {
            lib.BT_NVME_VOLATILE_CACHE: facts.volatile_cache,
            lib.BT_NVME_WRITE_ZEROES: facts.write_zeroes,
            lib.BT_NVME_DEALLOCATE: deallocates,
            lib.BT_NVME_DISCARD: facts.discard,
            lib.BT_NVME_NO_FLUSH: self.settings.no_flush,
        }
        return sum(flag for flag, there in present.items() if there)

    def _queue(self, pair: QueuePair) -> dict[str, Any]:
        assert self.hardware is not None
        return {
            "id": pair.place.id,
            "depth": pair.place.depth,
            "pages": pair.pages,
            "thread": pair.place.id - 1,
            "interrupt": self.hardware.interrupts[pair.place.vector],
            "memory": pair.memory.pointer,
            "iova": pair.memory.iova,
        }

    # ---- events of the controller (section 5.2) ----

    def _watch_events(self) -> None:
        possible = self.facts.namespace_notices and not self.shares_interrupt
        if possible and (self._events is None or self._events.done()):
            self._events = asyncio.ensure_future(self._serve_events())

    async def _serve_events(self) -> None:
        """Ends when the controller is reset or closed."""
        controller, recovery = self.controller, self.recovery
        assert controller is not None and recovery is not None
        try:
            await controller.watch_namespaces()
            while True:
                event = await controller.next_event()
                kind, detail = event & 7, event >> 8 & 0xFF
                if kind == EVENT_NOTICE and detail == NOTICE_NAMESPACE:
                    await controller.clear_namespace_event()
                    await self._namespace_changed()
                elif kind == EVENT_ERROR:
                    recovery.read_error_log()
                await asyncio.sleep(EVENT_PAUSE)
        except ControllerError as error:
            if not recovery.resetting and not self._closing:
                recovery.say(f"no more events of the controller: {error}")

    async def _namespace_changed(self) -> None:
        assert self.controller is not None and self.recovery is not None
        try:
            self._take(await self.controller.namespace(self.options.namespace))
        except ControllerError as error:
            self.recovery.reset(str(error))

    # ---- the end ----

    def interrupt(self) -> None:
        if self.recovery is not None:
            self.recovery.interrupt()

    async def close(self) -> None:
        """Flushes, then shuts the controller down and lets go of it. OSError for a failed flush."""
        self.interrupt()
        try:
            if self.opened and not self.read_only:
                await self.flush()
        finally:
            await self._close()

    async def _close(self) -> None:
        """Each step is done although one before it may fail.

        No request ends, and no memory is unmapped, before the controller is stopped or the device released.
        """
        async with contextlib.AsyncExitStack() as steps:
            if self.hardware is not None:
                steps.push_async_callback(self.hardware.close)
            if self.device is not None:
                steps.push_async_callback(self._release, self.device)
            if self.device is not None:
                steps.push_async_callback(self._stop_device, self.device)
            if self.controller is not None:
                steps.push_async_callback(self._stop_controller, self.controller)
            if self.recovery is not None and self.device is not None:
                steps.push_async_callback(self.recovery.close)
        self.hardware = self.controller = self.device = None

    async def _stop_device(self, device: Object) -> None:
        """What is still in flight, because somebody did not wait for it, fails."""
        lib.bt_nvme_resume(device.ptr, -errno.EIO)
        cookie, stopped = self.datapath.cookie()
        lib.bt_nvme_stop(device.ptr, cookie)
        await stopped
        self.datapath.end_session(self.session)

    async def _stop_controller(self, controller: Controller) -> None:
        """What fails is said, and the rest is done."""
        self._closing = True
        if self._events is not None:
            self._events.cancel()
            await asyncio.wait([self._events])
        try:
            if not self._released:
                await self._shut_down(controller)
        finally:
            await self._release_controller()

    async def _release_controller(self) -> None:
        """Its registers are not touched from here on."""
        assert self.controller is not None and self.hardware is not None
        self._released = True
        self.controller.admin.stop()
        await self.hardware.release_device()

    async def _shut_down(self, controller: Controller) -> None:
        if not self.brake.held:
            for step in (self._delete_queues, Controller.shut_down):
                try:
                    await step(controller)
                except ControllerError as error:
                    log.warning("%s: %s", self.label, error)
            with contextlib.suppress(ControllerError):  # it is said below, and the release stops it
                await self.brake.stop()
        if self.brake.trouble:
            log.warning("%s: %s", self.label, self.brake.trouble)

    async def _delete_queues(self, controller: Controller) -> None:
        if self.recovery is not None and self.recovery.resetting:
            return  # there may be none
        failure = controller.failure()
        if failure is not None:
            raise ControllerError(failure)
        for queue in self.queues:
            await controller.delete_queue(queue.place.id)

    async def _release(self, device: Object) -> None:
        """Before the memory goes that it uses."""
        if self.opened:
            self.object.release()
        device.release()
        await self.datapath.freed(device)

    @property
    def storage(self) -> object | None:
        return ("nvme", self.options.device.lower(), self.options.namespace)

    async def truncate(self, size: int) -> None:
        if size != self.size:
            raise self.error("Cannot resize device files")

    @property
    def filename(self) -> str:
        return f"nvme://{self.options.device}/{self.options.namespace}"

    def driver_statistics(self) -> BlockStatsSpecificNvme:
        assert self.device is not None
        raw = ffi.new("struct bt_nvme_counters *")
        lib.bt_nvme_get_counters(self.device.ptr, raw)
        return BlockStatsSpecificNvme(
            completion_errors=raw.completion_errors,
            aligned_accesses=raw.aligned,
            unaligned_accesses=raw.unaligned,
        )

    def counters(self) -> dict[str, Any]:
        assert self.device is not None and self.recovery is not None and self.hardware is not None
        raw = ffi.new("struct bt_nvme_counters *")
        lib.bt_nvme_get_counters(self.device.ptr, raw)
        return {
            **self.device.counters(),
            "queues": {"number": len(self.queues), **as_dict(raw), **self.recovery.counters()},
            "dma": self.hardware.dma.counters(),
            "controller": _shown(self.facts),
            "namespace": _shown(self.namespace),
        }
