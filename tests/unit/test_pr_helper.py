# SPDX-License-Identifier: Apache-2.0
"""The helper for persistent reservations: right and hostile clients, its program, and QEMU's own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from target.cli.main import main
from target.exports.address import listen_unix
from target.peers.iscsi_target.disk import Disk
from target.pr_helper import PrHelper, server
from target.reservations import (
    Answer,
    CheckCondition,
    Conflict,
    InAction,
    OutAction,
    Reservations,
    Type,
    commands,
)
from target.reservations.transports import Helper
from tests.support.daemon import blockdev, blocktarget_argv
from tests.support.tools import Completed, run

READ_KEYS = commands.reserve_in(InAction.READ_KEYS).cdb.ljust(16, b"\0")
REGISTER = commands.reserve_out(OutAction.REGISTER, sa_key=1)
REFUSED = struct.pack(">iI", 2, 0)
CAP_SYS_RAWIO = 1 << 17


class Back:
    """What the helper runs commands on: a disk for each file, an initiator for each process of a test."""

    def __init__(self) -> None:
        self.disks: dict[int, Disk] = {}
        self.nexus = "first"
        self.error: OSError | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, fd: int, cdb: bytes, data: bytes, length: int) -> Answer:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        disk = self.disks.setdefault(os.fstat(fd).st_ino, Disk(1 << 20))
        result = disk.execute(self.nexus, cdb, data)
        return Answer(result.status, result.sense, result.data[:length])


@pytest.fixture
def back() -> Back:
    return Back()


@pytest.fixture
def path(scratch: Path, back: Back) -> Iterator[Path]:
    """The socket of a helper in this process."""
    listener = listen_unix(str(scratch / "helper.sock"))
    helper = PrHelper(listener.socket, back)
    thread = threading.Thread(target=helper.serve)
    thread.start()
    yield scratch / "helper.sock"
    back.gate.set()
    helper.stop()
    thread.join(10)
    assert not thread.is_alive()
    listener.close()


@pytest.fixture
def disk(scratch: Path) -> Iterator[int]:
    """A descriptor that is open for reading and writing."""
    fd = os.open(scratch / "disk", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@contextlib.contextmanager
def client(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        assert connection.recv(4) == bytes(4)
        connection.sendall(bytes(4))
        yield connection


def response(connection: socket.socket) -> tuple[int, int, bytes]:
    """Status, sense key, data."""
    data = b""
    while len(data) < 104 or len(data) < 104 + struct.unpack_from(">I", data, 4)[0]:
        part = connection.recv(4096)
        assert part, "the helper closed the connection"
        data += part
    return struct.unpack_from(">i", data)[0], data[10] & 15, data[104:]


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# ---- clients that keep to the protocol ----


async def test_two_initiators(path: Path, disk: int, back: Back) -> None:
    device = Reservations(Helper(str(path), disk))
    await device.register(0, 1)
    await device.reserve(1, Type.EXCLUSIVE_ACCESS)
    back.nexus = "second"
    await device.register(0, 2)
    with pytest.raises(Conflict):
        await device.reserve(2, Type.EXCLUSIVE_ACCESS)
    await device.preempt(2, 1, Type.WRITE_EXCLUSIVE)
    assert (await device.read_keys()).keys == [2]
    found = await device.read_reservation()
    assert found is not None and (found.key, found.type) == (2, Type.WRITE_EXCLUSIVE)
    back.nexus = "first"
    assert (await device.read_keys()).keys == [2]
    assert device.attentions == ["UNIT ATTENTION, registrations preempted (2a/05)"]


def test_many_commands_on_one_connection_and_disks_apart(path: Path, disk: int, scratch: Path) -> None:
    other = os.open(scratch / "other", os.O_RDWR | os.O_CREAT)
    with client(path) as connection:
        for _ in range(50):
            socket.send_fds(connection, [REGISTER.cdb.ljust(16, b"\0")], [disk])
            connection.sendall(REGISTER.data_out)
            assert response(connection)[0] in (0, 0x18)
        for fd, count in ((disk, 1), (other, 0)):
            socket.send_fds(connection, [READ_KEYS], [fd])
            status, _, data = response(connection)
            assert (status, len(data)) == (0, 8 + 8 * count)
    os.close(other)


def test_a_command_byte_by_byte(path: Path, disk: int) -> None:
    with client(path) as connection:
        socket.send_fds(connection, [REGISTER.cdb[:1]], [disk])
        for byte in REGISTER.cdb[1:].ljust(15, b"\0") + REGISTER.data_out:
            connection.send(bytes((byte,)))
        assert response(connection)[0] == 0


def test_an_allocation_that_is_too_small_for_all_keys(path: Path, disk: int) -> None:
    with client(path) as connection:
        socket.send_fds(connection, [REGISTER.cdb.ljust(16, b"\0") + REGISTER.data_out], [disk])
        assert response(connection)[0] == 0
        socket.send_fds(
            connection, [commands.reserve_in(InAction.READ_KEYS, 10).cdb.ljust(16, b"\0")], [disk]
        )
        assert response(connection) == (0, 0, bytes.fromhex("00000001 00000008 0000"))


@pytest.mark.parametrize(
    ("number", "status", "key"),
    [
        (errno.EBADE, 0x18, 0),
        (errno.EDOM, 0x28, 0),
        (errno.ENOTTY, 2, 5),
        (errno.EPERM, 2, 0xB),
        (errno.EIO, 2, 0xB),
        (errno.ETIMEDOUT, 2, 0xB),
    ],
)
def test_what_the_kernel_refuses(
    path: Path, disk: int, back: Back, number: int, status: int, key: int
) -> None:
    back.error = OSError(number, "no")
    with client(path) as connection:
        for _ in range(2):  # the connection stays
            socket.send_fds(connection, [READ_KEYS], [disk])
            assert response(connection) == (status, key, b"")


def test_a_descriptor_for_reading_changes_nothing(path: Path, scratch: Path, disk: int, back: Back) -> None:
    fd = os.open(scratch / "disk", os.O_RDONLY)
    with client(path) as connection:
        socket.send_fds(connection, [REGISTER.cdb.ljust(16, b"\0") + REGISTER.data_out], [fd])
        assert response(connection)[:2] == (2, 5)
        socket.send_fds(connection, [READ_KEYS], [fd])
        assert response(connection) == (0, 0, bytes(8))
    os.close(fd)


async def test_an_ordinary_file_takes_no_commands(scratch: Path, disk: int) -> None:
    """With the real ioctl."""
    listener = listen_unix(str(scratch / "real.sock"))
    helper = PrHelper(listener.socket)
    thread = threading.Thread(target=helper.serve)
    thread.start()
    with pytest.raises(CheckCondition, match="ILLEGAL REQUEST, invalid command operation code"):
        await Reservations(Helper(str(scratch / "real.sock"), disk)).read_keys()
    helper.stop()
    thread.join()
    listener.close()


# ---- clients that do not ----


def half(connection: socket.socket, data: bytes, fd: int) -> None:
    socket.send_fds(connection, [data], [fd])
    connection.shutdown(socket.SHUT_WR)


HOSTILE: dict[str, Callable[[socket.socket, int], object]] = {
    "another command": lambda s, fd: socket.send_fds(s, [b"\x12".ljust(16, b"\0")], [fd]),
    "no descriptor": lambda s, fd: s.send(READ_KEYS),
    "two descriptors": lambda s, fd: socket.send_fds(s, [READ_KEYS], [fd, fd]),
    "many descriptors": lambda s, fd: socket.send_fds(s, [READ_KEYS], [fd] * 100),
    "a descriptor twice": lambda s, fd: [
        socket.send_fds(s, [part], [fd]) for part in (READ_KEYS[:8], READ_KEYS[8:])
    ],
    "an allocation above 8 KiB": lambda s, fd: socket.send_fds(
        s, [bytes.fromhex("5e000000000000200100").ljust(16, b"\0")], [fd]
    ),
    "parameters above 8 KiB": lambda s, fd: socket.send_fds(
        s, [bytes.fromhex("5f00000000ffffffff00").ljust(16, b"\0")], [fd]
    ),
    "half a command": lambda s, fd: half(s, READ_KEYS[:7], fd),
    "half of the parameters": lambda s, fd: half(s, REGISTER.cdb.ljust(16, b"\0") + bytes(23), fd),
    "a command that does not go on": lambda s, fd: socket.send_fds(s, [READ_KEYS[:7]], [fd]),
    "parameters that do not come": lambda s, fd: socket.send_fds(s, [REGISTER.cdb.ljust(16, b"\0")], [fd]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_violations_end_the_connection(
    path: Path, disk: int, back: Back, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was run, no descriptor is left open, and another client goes on."""
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    with client(path) as bystander:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with client(path) as connection:
                HOSTILE[name](connection, disk)
                assert closed(connection)
        assert not any(found.reservations.keys for found in back.disks.values())
        end = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > before:
            assert time.monotonic() < end, "descriptors are left open"
            time.sleep(0.01)
        socket.send_fds(bystander, [READ_KEYS], [disk])
        assert response(bystander) == (0, 0, bytes(8))


def test_features_that_there_are_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.recv(4)
        connection.sendall(b"\0\0\0\1")
        assert closed(connection)


def test_parameters_of_no_length(path: Path, disk: int) -> None:
    with client(path) as connection:
        socket.send_fds(connection, [bytes.fromhex("5f000000000000000000").ljust(16, b"\0")], [disk])
        assert response(connection)[:2] == (2, 5)


def test_clients_have_a_limit(path: Path, disk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 2)
    with client(path) as first, client(path):
        with socket.socket(socket.AF_UNIX) as third:
            third.settimeout(10)
            third.connect(str(path))
            assert closed(third)
        socket.send_fds(first, [READ_KEYS], [disk])
        assert response(first)[0] == 0


def test_a_client_that_waits_for_its_device_holds_up_no_other(path: Path, disk: int, back: Back) -> None:
    back.gate.clear()
    with client(path) as slow, client(path) as quick:
        socket.send_fds(slow, [READ_KEYS], [disk])
        quick.sendall(b"\x12".ljust(16, b"\0"))
        assert closed(quick)
        back.gate.set()
        assert response(slow)[0] == 0


# ---- the program ----


@contextlib.contextmanager
def program(*argv: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        blocktarget_argv("pr-helper", *argv),
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, process.stderr.read()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not (path.exists() and (stat.S_ISSOCK(path.stat().st_mode) or path.read_text().strip())):
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.02)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def confined_status(pid: int) -> dict[str, str]:
    """The program's status when it has given up its privileges, which it does after it wrote its pidfile."""
    end = time.monotonic() + 20
    while (status := status_of(pid))["NoNewPrivs"] != "1":
        assert time.monotonic() < end, status
        time.sleep(0.02)
    return status


async def test_the_program_keeps_one_privilege(scratch: Path, disk: int) -> None:
    sock, pidfile = scratch / "helper.sock", scratch / "pid"
    with program("--socket", str(sock), "--pidfile", str(pidfile)) as process:
        wait_for(pidfile)
        assert pidfile.read_text().strip() == str(process.pid)
        status = confined_status(process.pid)
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16)
        assert int(status["CapEff"], 16) & ~CAP_SYS_RAWIO == 0
        assert status["NoNewPrivs"] == "1"
        with pytest.raises(CheckCondition, match="ILLEGAL REQUEST"):
            await Reservations(Helper(str(sock), disk)).read_keys()
    assert not sock.exists() and not pidfile.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
def test_the_program_becomes_another_user(scratch: Path) -> None:
    sock = scratch / "helper.sock"
    with program(
        "-k", str(sock), "--user", "nobody", "--group", "65534", "-f", str(scratch / "pid")
    ) as process:
        wait_for(scratch / "pid")
        status = confined_status(process.pid)
        assert status["Uid"].split() == ["65534"] * 4 == status["Gid"].split()
        assert status["Groups"] == ""
        assert int(status["CapEff"], 16) & ~CAP_SYS_RAWIO == 0
        client(sock).__enter__().close()


def test_a_socket_that_is_passed(scratch: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(scratch / "passed"))
    listener.listen()
    number = listener.fileno()
    with program("--fd", str(number), pass_fds=(number,)), client(scratch / "passed"):
        pass
    listener.close()


def test_socket_activation(scratch: Path, disk: int) -> None:
    """systemd-socket-activate starts it for the first client."""
    sock = scratch / "activated"
    command = ["systemd-socket-activate", "-l", str(sock), *blocktarget_argv("pr-helper")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(sock)
        with client(sock) as connection:
            socket.send_fds(connection, [READ_KEYS], [disk])
            assert response(connection)[:2] == (2, 5)
    finally:
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of --socket and --fd is needed"),
        (["--socket", "/x", "--fd", "3"], "one of --socket and --fd is needed"),
        (["--socket", "/nowhere/at/all"], "Failed to bind socket to /nowhere/at/all"),
        (["--fd", "99"], "File descriptor '99' is not a socket"),
        (["--socket", "SCRATCH/s", "--user", "no-such-user"], "there is no user 'no-such-user'"),
        (["--socket", "SCRATCH/s", "more"], "more: Unexpected argument"),
    ],
)
def test_what_the_program_refuses(scratch: Path, argv: list[str], message: str) -> None:
    done = run(
        *blocktarget_argv("pr-helper", *(word.replace("SCRATCH", str(scratch)) for word in argv)), check=False
    )
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (scratch / "s").exists()


# ---- QEMU's own client, and QEMU's own helper ----


def test_qemus_client_connects(path: Path) -> None:
    """qemu-storage-daemon makes the object only when the handshake succeeds."""
    argv = ["qemu-storage-daemon", "--object", f"pr-manager-helper,id=pr0,path={path}"]
    argv += ["--chardev", "stdio,id=q", "--monitor", "chardev=q"]
    question = {"execute": "qom-get", "arguments": {"path": "/objects/pr0", "property": "path"}}
    talk = [{"execute": "qmp_capabilities"}, question, {"execute": "quit"}]
    done = run(*argv, input="".join(map(json.dumps, talk)))
    assert f'"return": "{path}"' in done.stdout


@pytest.fixture
def qemus_helper(scratch: Path) -> Iterator[Path]:
    sock = scratch / "qemu.sock"
    process = subprocess.Popen(["qemu-pr-helper", "-k", str(sock), "-f", str(scratch / "qemu.pid")])
    try:
        wait_for(sock)
        yield sock
    finally:
        process.terminate()
        process.wait(10)


async def test_our_client_with_qemus_helper(qemus_helper: Path, disk: int, scratch: Path) -> None:
    """It cannot reach a disk here: its refusals have to arrive."""
    device = Reservations(Helper(str(qemus_helper), disk))
    with pytest.raises(CheckCondition, match="ABORTED COMMAND"):
        await device.read_keys()
    with pytest.raises(CheckCondition, match="ABORTED COMMAND"):
        await device.register(0, 1)
    reader = os.open(scratch / "disk", os.O_RDONLY)
    with pytest.raises(CheckCondition, match="invalid command operation code"):
        await Reservations(Helper(str(qemus_helper), reader)).register(0, 1)
    os.close(reader)


# ---- the object, the option, the verb ----


def verb(path: Path, file: Path, *words: str) -> Completed:
    node = blockdev(driver="file", filename=str(file), pr_manager="pr0")
    helper = ["--object", f"pr-manager-helper,id=pr0,path={path}"]
    return run(*blocktarget_argv("reservations", *helper, *node, *words), check=False)


def test_the_verb_through_a_helper(path: Path, disk: int, scratch: Path, back: Back) -> None:
    file = scratch / "disk"
    done = verb(
        path, file, "register,sa-key=0xab", "reserve,type=write-exclusive", "read-reservation", "read-keys"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "reserved write-exclusive by 0x00000000000000ab\n0x00000000000000ab\n"
    back.nexus = "second"
    done = verb(
        path, file, "register", "reserve", "--sa-key", "2", "--type", "write-exclusive", "--output=json"
    )
    assert done.returncode == 2
    assert done.stderr == "blocktarget: node 'device': reserve: reservation conflict\n"
    assert json.loads(done.stdout) == {
        "actions": [{"action": "register"}, {"action": "reserve", "error": "reservation conflict"}],
        "unit-attentions": [],
    }
    done = verb(path, file, "register-ignore", "--sa-key", "3", "--aptpl")
    assert done.returncode == 3 and "invalid field in parameter list" in done.stderr
    done = verb(path, file, "preempt,key=2,sa-key=0xab,type=exclusive-access", "read-full-status")
    assert done.stdout == ("0x0000000000000002 second at port 1, holds the reservation exclusive-access\n")
    done = verb(path, file, "clear,key=2", "read-keys", "read-reservation", "report-capabilities")
    assert done.stdout.splitlines()[:2] == ["no keys are registered", "no reservation"]
    assert "types: write-exclusive, exclusive-access, " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "an action is expected"),
        (["shout"], "unknown action 'shout'"),
        (["register"], "action 'register': 'sa-key' is missing"),
        (["reserve,key=1"], "action 'reserve': 'type' is missing"),
        (["reserve,key=1,type=all"], "'type' is one of write-exclusive, exclusive-access"),
        (["clear,key=0x10000000000000000"], "'key' expects a number of 64 bits"),
        (["clear,key=-1"], "'key' expects a number of 64 bits"),
        (["clear,kye=1"], "Parameter 'kye' is unexpected"),
        (["read-keys", "--output", "xml"], "expects human or json"),
    ],
)
def test_what_the_verb_refuses(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["reservations", "--blockdev", "file,filename=/nowhere", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_nodes_that_cannot_reserve(scratch: Path, path: Path, disk: int) -> None:
    done = run(*blocktarget_argv("reservations", "--blockdev", "null-co", "read-keys"), check=False)
    assert done.returncode == 1
    assert done.stderr == "blocktarget: node 'device': driver 'null-co' takes no SCSI commands\n"
    file = ["--blockdev", f"file,node-name=f,filename={scratch / 'disk'}"]
    done = run(*blocktarget_argv("reservations", *file, "read-keys"), check=False)
    assert done.returncode == 1
    assert done.stderr == "blocktarget: node 'f': read-keys: Inappropriate ioctl for device\n"


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([], "node 'd': option 'pr-manager': No persistent reservation manager with id 'pr0'"),
        (["secret,id=pr0,data=x"], "Object with id 'pr0' is not a persistent reservation manager"),
        (
            ["pr-manager-helper,id=pr0,path=/nowhere"],
            "pr-manager-helper 'pr0': Failed to connect to '/nowhere': No such file or directory",
        ),
    ],
)
def test_a_manager_that_is_none(scratch: Path, disk: int, objects: list[str], message: str) -> None:
    words = [word for option in objects for word in ("--object", option)]
    node = blockdev(driver="file", node_name="d", filename=str(scratch / "disk"), pr_manager="pr0")
    done = run(*blocktarget_argv("daemon", *words, *node), check=False)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
