# SPDX-License-Identifier: Apache-2.0
"""The target itself: a listener, its targets with their disks, and the rules by which it misbehaves."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from target.peers.iscsi_target.connection import Connection
from target.peers.iscsi_target.disk import Disk, Features
from target.peers.iscsi_target.faults import Action, Rule, When
from target.peers.iscsi_target.login import Account, Limits, Login
from target.peers.iscsi_target.pdu import Pdu
from target.peers.iscsi_target.sense import POWER_ON, Sense

TARGET = "iqn.2026-11.org.example:mock"
NEXUS_LOST = Sense(6, 0x29, 0x07)


class IscsiTarget:
    """An iSCSI target on loopback, in threads of its own; ``with IscsiTarget() as target`` starts it.

    It keeps its disks and its port when it is stopped and started again.
    """

    max_write = 16 << 20  # bytes of one command
    max_data_in = 1 << 18  # bytes of one Data-In
    window = 128  # commands that an initiator may have under way
    host = "127.0.0.1"

    def __init__(self, *, limits: Limits | None = None, attentions: bool = True) -> None:
        self.limits = limits or Limits()
        self.accounts: dict[str, Account | None] = {}
        self.disks: dict[str, dict[int, Disk]] = {}
        self.port = 0
        self.connections: list[Connection] = []
        self.logins = 0
        self.digests = {"header": 0, "data": 0}  # logins that agreed on them
        self._attentions = attentions
        self._rules: list[Rule] = []
        self._lock = threading.RLock()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    # ---- what it serves ----

    def add_target(self, name: str = TARGET, account: Account | None = None) -> None:
        """A target; with an account only for who knows its password (CHAP)."""
        self.accounts[name] = account
        self.disks.setdefault(name, {})

    def add_disk(
        self,
        size: int,
        *,
        target: str = TARGET,
        lun: int = 1,
        block_size: int = 512,
        features: Features | None = None,
        read_only: bool = False,
    ) -> Disk:
        """A logical unit of that many bytes."""
        if target not in self.accounts:
            self.add_target(target)
        disks = self.disks[target]
        peers = next(iter(disks.values())).peers if disks else {}
        disk = Disk(
            size, block_size, lun, features or Features(), read_only=read_only, write_cache=True, peers=peers
        )
        disks[lun] = disk
        return disk

    def rule(self, when: When, action: Action, *, after: int = 0, count: int = -1) -> Rule:
        """It misbehaves so, from the (after + 1)-th matching request on, count times (negative: always)."""
        made = Rule(when, action, after, count)
        self._rules.append(made)
        return made

    def behave(self) -> None:
        """Forgets all rules."""
        self._rules.clear()

    # ---- life ----

    def start(self) -> Self:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._begin(self._accept, listener)
        return self

    def stop(self) -> None:
        """Closes its port and all connections."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.drop()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread of the mock target does not end"
        self._threads.clear()

    def drop(self) -> None:
        """Cuts all connections; new ones are taken."""
        with self._lock:
            connections, self.connections = self.connections, []
        for connection in connections:
            connection.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _begin(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, accepted, Login(self.accounts, self.limits))
            with self._lock:
                self.connections.append(connection)
            self._begin(connection.run)

    # ---- for connections ----

    def ended(self, connection: Connection) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self.connections.remove(connection)

    def interfere(self, connection: Connection, request: Pdu) -> bool:
        """Whether a rule has dealt with the request."""
        with self._lock:
            rules = list(self._rules)
        return any(rule.act(connection, request) for rule in rules)

    def session_number(self) -> int:
        """The TSIH, never 0."""
        with self._lock:
            self.logins += 1
            return self.logins & 0x7FFF or 1

    def entered(self, connection: Connection) -> None:
        """A login is complete: an older session of the same nexus ends (RFC 7143 section 6.3.5)."""
        name = connection.login.target
        with self._lock:
            self.digests["header"] += connection.parameters.header_digest
            self.digests["data"] += connection.parameters.data_digest
            for other in list(self.connections):
                same = other.nexus == connection.nexus and other.login.target == name
                if same and other is not connection:
                    self.connections.remove(other)
                    other.close()
            for disk in self.disks[name].values():
                known = connection.nexus in disk.attentions
                disk.attentions.setdefault(connection.nexus, [])
                if self._attentions:
                    disk.tell(connection.nexus, NEXUS_LOST if known else POWER_ON)

    # ---- how to reach it ----

    @property
    def portal(self) -> str:
        return f"{self.host}:{self.port}"

    def url(self, *, target: str = TARGET, lun: int = 1) -> str:
        account = self.accounts[target]
        login = f"{account.user}%{account.password}@" if account else ""
        return f"iscsi://{login}{self.portal}/{target}/{lun}"
