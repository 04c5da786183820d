# SPDX-License-Identifier: Apache-2.0
"""One connection to the target: login, then requests in the order they come (RFC 7143 sections 4 and 11).

Commands run one at a time; several writes may wait for their data at once.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from target.peers.iscsi_target import pdu
from target.peers.iscsi_target.disk import LUN_NOT_SUPPORTED, Disk
from target.peers.iscsi_target.login import Login, LoginFailed, Parameters, response
from target.peers.iscsi_target.pdu import FINAL, NO_TAG, WRITE, Opcode, Pdu, PduError
from target.peers.iscsi_target.sense import CHECK_CONDITION, GOOD, Result

if TYPE_CHECKING:
    from target.peers.iscsi_target.server import IscsiTarget

log = logging.getLogger("blocktarget.mock")
OVERFLOW, UNDERFLOW, STATUS = 0x04, 0x02, 0x01
INQUIRY, REPORT_LUNS = 0x12, 0xA0
PROTOCOL_ERROR = 0x04  # of a Reject


class Gone(Exception):
    """The connection ended."""


@dataclass
class Task:
    """A write that waits for data."""

    request: Pdu
    data: bytearray
    expected: int
    transfer: int = 0  # the Target Transfer Tag of the R2T under way
    until: int = 0  # offset where that burst ends
    r2ts: int = 0


@dataclass(eq=False)
class Connection:
    """``nexus`` is empty until the login has told it."""

    target: IscsiTarget
    socket: socket.socket
    login: Login
    nexus: str = ""
    filter: Callable[[bytes], bytes] | None = None
    """changes PDUs on their way out"""
    wire: Callable[[bytes], bytes] | None = None
    """changes them with their digests, as a bad line does"""
    closed: bool = False
    _tasks: dict[int, Task] = field(default_factory=dict)
    _stat_sn: int = 1
    _expected: int = 1  # ExpCmdSN
    _transfer: int = 0
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _text: dict[int, bytes] = field(default_factory=dict)
    _kept: bytearray | None = None

    @property
    def parameters(self) -> Parameters:
        return self.login.parameters

    # ---- the socket ----

    def run(self) -> None:
        """Serves it to its end."""
        try:
            self._log_in()
            while True:
                self._serve(self.receive())
        except (Gone, OSError):
            pass
        except (PduError, LoginFailed) as error:
            log.debug("connection dropped: %s", error)
        finally:
            self.close()
            self.target.ended(self)

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def send_raw(self, data: bytes) -> None:
        if self.closed:
            raise Gone
        if self._kept is not None:
            self._kept += data
            return
        with self._sending:
            self.socket.sendall(data)

    @contextlib.contextmanager
    def kept(self) -> Iterator[bytearray]:
        """What would be sent meanwhile is put there instead."""
        self._kept = bytearray()
        try:
            yield self._kept
        finally:
            self._kept = None

    def receive(self) -> Pdu:
        """The next request of the full feature phase."""
        return self._receive(self.parameters.header_digest, self.parameters.data_digest)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise Gone
            data += part
        return bytes(data)

    def _receive(self, header_digest: bool, data_digest: bool) -> Pdu:
        return pdu.decode(self._exactly, header_digest, data_digest)

    def _send(self, answer: Pdu) -> None:
        in_login = not self.login.done or answer.opcode == Opcode.LOGIN_RESPONSE
        digests = (False, False) if in_login else (self.parameters.header_digest, self.parameters.data_digest)
        change = self.filter
        if change is not None:
            # A changed header has a right digest: it is the peer's reading of the fields that is tested.
            raw = change(answer.header + answer.data)
            if not raw:
                raise Gone
            answer = Pdu(raw[: pdu.BHS_SIZE], raw[pdu.BHS_SIZE :])
        encoded = pdu.encode(answer, *digests)
        self.send_raw(encoded if self.wire is None else self.wire(encoded))

    def _reply(
        self,
        opcode: int,
        request: Pdu | None,
        *,
        flags: int = FINAL,
        byte2: int = 0,
        byte3: int = 0,
        lun: bytes = pdu.NO_LUN,
        data: bytes = b"",
        words: dict[int, int] | None = None,
        status: bool = True,
    ) -> None:
        """Sends a PDU with the sequence numbers; ``status``: it takes a StatSN."""
        last = self._expected + self.target.window - 1
        numbers = {24: self._stat_sn, 28: self._expected, 32: last, **(words or {})}
        if status:
            self._stat_sn += 1
        tag = NO_TAG if request is None else request.itt
        self._send(
            pdu.make(
                opcode, flags=flags, itt=tag, lun=lun, data=data, byte2=byte2, byte3=byte3, words=numbers
            )
        )

    # ---- login ----

    def _log_in(self) -> None:
        entered = False
        while not entered:
            request = self._receive(False, False)
            if request.opcode != Opcode.LOGIN:
                raise PduError(f"opcode {request.opcode:#x} before the login")
            self._expected = request.cmd_sn
            if self.target.interfere(self, request):
                continue
            try:
                flags, text = self.login.answer(request)
                entered = self.login.done
                if entered:
                    self._enter(request)
            except LoginFailed as failed:
                self._send(response(request, 0, b"", 0, self._stat_sn, failed.status))
                raise
            tsih = self.target.session_number() if entered else 0
            self._send(response(request, flags, text, tsih, self._stat_sn, 0))
            self._stat_sn += 1
            self.filter = None

    def _enter(self, request: Pdu) -> None:
        isid = request.header[8:14].hex()
        self.nexus = f"{self.login.initiator},i,0x{isid}"
        if not self.login.discovery:
            self.target.entered(self)

    # ---- full feature phase ----

    def _serve(self, request: Pdu) -> None:
        self.filter = self.wire = None
        if request.opcode in (Opcode.DATA_OUT,):
            self._data_out(request)
            return
        if not request.immediate and request.opcode != 0x10:
            if request.cmd_sn != self._expected:
                raise PduError(f"CmdSN {request.cmd_sn}, not {self._expected}")
            self._expected = (self._expected + 1) & 0xFFFFFFFF
        if self.target.interfere(self, request):
            return
        match request.opcode:
            case Opcode.SCSI_COMMAND:
                self._command(request)
            case Opcode.NOP_OUT:
                if request.itt != NO_TAG:
                    self._reply(Opcode.NOP_IN, request, data=request.data, words={20: NO_TAG})
            case Opcode.TEXT:
                self._text_request(request)
            case Opcode.TASK_MANAGEMENT:
                self._task_management(request)
            case Opcode.LOGOUT:
                self._reply(Opcode.LOGOUT_RESPONSE, request, words={40: 0})
                raise Gone
            case _:
                self.reject(request)

    def reject(self, request: Pdu) -> None:
        self._reply(Opcode.REJECT, None, byte2=PROTOCOL_ERROR, data=request.header)

    def _text_request(self, request: Pdu) -> None:
        keys = pdu.decode_text(request.data)
        if keys.get("SendTargets") is None:
            self.reject(request)
            return
        address = f"{self.target.host}:{self.target.port},1"
        wanted = keys["SendTargets"]
        names = [name for name in self.target.accounts if wanted in ("All", name, "")]
        text = b"".join(f"TargetName={name}\0TargetAddress={address}\0".encode() for name in names)
        self._reply(Opcode.TEXT_RESPONSE, request, data=text, words={20: NO_TAG})

    def _task_management(self, request: Pdu) -> None:
        """ABORT TASK of a write that waits for data; the others have ended before this is read."""
        function = request.flags & 0x7F
        found = self._tasks.pop(request.word(20), None) if function == 1 else None
        if function in (2, 3, 5, 6, 7):
            self._tasks.clear()
        known = found is not None or function in (2, 3, 5, 6, 7)
        self._reply(Opcode.TASK_MANAGEMENT_RESPONSE, request, byte2=0 if known else 1)

    # ---- commands ----

    def _command(self, request: Pdu) -> None:
        expected = request.word(20)
        if not request.flags & WRITE or not expected:
            self.finish(request, self._execute(request, b""))
            return
        if request.itt in self._tasks or expected > self.target.max_write:
            self.reject(request)
            return
        if request.data and not self.parameters.immediate_data:
            raise PduError("immediate data, which was not agreed")
        task = self._tasks[request.itt] = Task(request, bytearray(request.data), expected)
        if len(task.data) > min(expected, self.parameters.first_burst):
            raise PduError("more immediate data than agreed")
        unsolicited = not request.flags & FINAL
        if unsolicited and self.parameters.initial_r2t:
            raise PduError("unsolicited data, which were not agreed")
        if unsolicited:
            task.transfer, task.until = NO_TAG, min(expected, self.parameters.first_burst)
        else:
            self._go_on(task)

    def _data_out(self, request: Pdu) -> None:
        task = self._tasks.get(request.itt)
        if task is None:
            return  # of a command that has ended already, with an error
        if request.word(20) != task.transfer or request.word(40) != len(task.data):
            raise PduError(f"Data-Out at {request.word(40)}, not {len(task.data)}, or of another transfer")
        task.data += request.data
        if len(task.data) > task.until:
            raise PduError("more data than asked for")
        if request.flags & FINAL:
            if task.transfer != NO_TAG and len(task.data) != task.until:
                raise PduError("less data than asked for")
            self._go_on(task)

    def _go_on(self, task: Task) -> None:
        """Asks for more data, or runs the command."""
        if len(task.data) >= task.expected:
            del self._tasks[task.request.itt]
            self.finish(task.request, self._execute(task.request, bytes(task.data)))
            return
        length = min(self.parameters.max_burst, task.expected - len(task.data))
        self._transfer += 1
        task.transfer, task.until = self._transfer, len(task.data) + length
        self.ask(task.request, len(task.data), length, task.transfer, task.r2ts)
        task.r2ts += 1

    def ask(self, request: Pdu, offset: int, length: int, transfer: int, number: int) -> None:
        """For data of a write: an R2T."""
        words = {20: transfer, 36: number, 40: offset, 44: length}
        self._reply(Opcode.R2T, request, lun=request.lun, words=words, status=False)

    def _execute(self, request: Pdu, data: bytes) -> Result:
        disks = self.target.disks[self.login.target]
        number = (request.lun[0] & 0x3F) << 8 | request.lun[1]
        if request.cdb[0] == REPORT_LUNS:
            return Result(GOOD, _report_luns(disks, int.from_bytes(request.cdb[6:10], "big")))
        disk = disks.get(number)
        if disk is not None:
            return disk.execute(self.nexus, request.cdb, data)
        if request.cdb[0] == INQUIRY and not request.cdb[1] & 1:
            return Result(GOOD, b"\x7f\0\6\2\x1f".ljust(36, b"\0")[: int.from_bytes(request.cdb[3:5], "big")])
        return Result(CHECK_CONDITION, sense=LUN_NOT_SUPPORTED.encode())

    def finish(self, request: Pdu, result: Result) -> None:
        """Sends data and status of a command."""
        expected = request.word(20)
        writes = bool(request.flags & WRITE)
        data = b"" if writes else result.data[:expected]
        flags, residual = 0, 0
        if not writes:
            flags = OVERFLOW if len(result.data) > expected else UNDERFLOW if len(data) < expected else 0
            residual = abs(len(result.data) - expected)
        if data:
            count = self._send_data(request, data, flags, residual, result.status)
            if result.status == GOOD:
                return
        else:
            count = 0
        sense = struct.pack(">H", len(result.sense)) + result.sense if result.sense else b""
        self._reply(
            Opcode.SCSI_RESPONSE,
            request,
            flags=FINAL | flags,
            byte3=result.status,
            data=sense,
            words={36: count, 44: residual},
        )

    def _send_data(self, request: Pdu, data: bytes, flags: int, residual: int, status: int) -> int:
        """Data-In PDUs, the last with the status when that is GOOD; returns their number."""
        step = max(1, min(self.parameters.max_receive, self.target.max_data_in))
        count = 0
        for at in range(0, len(data), step):
            part = data[at : at + step]
            last = at + step >= len(data)
            with_status = last and status == GOOD
            bits = (FINAL if last else 0) | ((STATUS | flags) if with_status else 0)
            words = {20: NO_TAG, 36: count, 40: at, 44: residual if with_status else 0}
            if not with_status:
                words[24] = 0
            self._reply(
                Opcode.DATA_IN,
                request,
                flags=bits,
                byte3=status if with_status else 0,
                data=part,
                words=words,
                status=with_status,
            )
            count += 1
        return count

    # ---- on the target's own account ----

    def ping(self, data: bytes = b"") -> None:
        """A NOP-In that wants an answer."""
        self._reply(Opcode.NOP_IN, None, data=data, words={20: 0x77}, status=False)

    def send_async(self, event: int) -> None:
        """An Asynchronous Message: 1 asks for a logout, 2 announces the end of the connection."""
        self._reply(Opcode.ASYNC_MESSAGE, None, words={36: event << 24})


def _report_luns(disks: dict[int, Disk], allocation: int) -> bytes:
    luns = b"".join(number.to_bytes(2, "big") + bytes(6) for number in sorted(disks))
    return (struct.pack(">I4x", len(luns)) + luns)[:allocation]
