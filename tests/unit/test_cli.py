# SPDX-License-Identifier: Apache-2.0
"""The commands as processes: errors, life, signals, pidfile, background, --run, sockets, the YAML file."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from target import __version__
from target.cli import options
from target.cli.errors import UsageError
from target.cli.options import Option
from tests.support.daemon import blocktarget_argv

SECONDS = 20
NULL = ["--blockdev", "null-co,node-name=n,size=1M,read-zeroes=on"]

Run = Callable[..., subprocess.CompletedProcess[str]]
Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def env() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root)}


@pytest.fixture
def run(scratch: Path, env: dict[str, str]) -> Run:
    """run(command, *words) runs ``blocktarget`` in the scratch directory to its end."""

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            blocktarget_argv(*words),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=scratch,
            env=env,
            stdin=subprocess.DEVNULL,
        )

    return call


@pytest.fixture
def spawn(scratch: Path, env: dict[str, str]) -> Iterator[Spawn]:
    """spawn(command, *words) starts ``blocktarget`` and returns when it says that it is ready."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str | Path, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            blocktarget_argv(*words), stdout=subprocess.PIPE, text=True, cwd=scratch, env={**env, **more}
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line == "blocktarget: ready\n":
                return process
        raise AssertionError(f"it ended with {process.wait()} and was not ready")

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def nbd(path: str = "nbd.sock", *more: str) -> list[str]:
    server = ["--nbd-server", f"addr.type=unix,addr.path={path}"]
    return [*NULL, *server, "--export", "nbd,id=e,node-name=n,writable=on", *more]


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(SECONDS)


# ---- words ----

KNOWN = {"blockdev": True, "daemonize": False, "help": False}


@pytest.mark.parametrize(
    ("words", "wanted", "others"),
    [
        (["--blockdev", "a", "--blockdev=b=c"], [Option("blockdev", "a"), Option("blockdev", "b=c")], []),
        (["--daemonize", "x"], [Option("daemonize", "")], ["x"]),
        (["-h"], [Option("help", "")], []),
        (["--blockdev", "--daemonize"], [Option("blockdev", "--daemonize")], []),
        (["x", "--", "--help"], [], ["x", "--help"]),
        (["-"], [], ["-"]),
    ],
)
def test_splitting(words: list[str], wanted: list[Option], others: list[str]) -> None:
    assert options.split(words, KNOWN, {"h": "help"}) == (wanted, others)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foo"], "unrecognized option '--foo'"),
        (["--block", "x"], "unrecognized option '--block'"),
        (["-x"], "invalid option -- 'x'"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
    ],
)
def test_splitting_errors(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as info:
        options.split(words, KNOWN, {"h": "help"})
    assert str(info.value) == message


# ---- help and version ----


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--version"], f"blocktarget version {__version__}\n"),
        (["daemon", "-V"], f"blocktarget version {__version__}\n"),
        (["--help"], "daemon [options]"),
        (["daemon", "--help"], "--blockdev [driver=]<driver>"),
        (["serve", "-h"], "serve [options] FILE.yaml"),
        (["daemon", "--blockdev", "help"], "  host_device\n"),
        (["daemon", "--blockdev", "file,help"], "  aio=<io_uring|native|threads> (default: threads)\n"),
        (["daemon", "--blockdev", "driver=raw,?"], "  file=<node> (required)\n"),
        (["daemon", "--object", "help"], "  iothread\n"),
        (["daemon", "--object", "iothread,help"], "  poll-max-ns=<int> (default: 32768)\n"),
        (["daemon", "--export", "help"], "  vhost-user-blk\n"),
        (["daemon", "--export", "nbd,help"], "  writethrough=<bool> (default: off)\n"),
        (["daemon", "--nbd-server", "help"], "  addr.path=<str> (with type=unix)\n"),
    ],
)
def test_what_is_shown(run: Run, words: list[str], wanted: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert wanted in done.stdout


# ---- errors ----


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "a command is missing; try 'blocktarget --help'"),
        (["sing"], "unknown command 'sing'; try 'blocktarget --help'"),
        (["daemon", "--foo"], "unrecognized option '--foo'"),
        (["daemon", "foo"], "foo: Unexpected argument"),
        (
            ["daemon", "--chardev", "udp,id=c"],
            "option --chardev: chardev 'c': 'udp' is not a valid char driver name",
        ),
        (["daemon", "--monitor", "c"], 'option --monitor: chardev "c" not found'),
        (["daemon", "-T", "x"], "option --trace is not supported"),
        (["daemon", "--daemonize", "--run", "true"], "--daemonize and --run exclude each other"),
        (
            ["daemon", "--blockdev", "null-co,node-name=n,x=1"],
            "option --blockdev: node 'n': Parameter 'x' is unexpected",
        ),
        (
            ["daemon", "--blockdev", "file,node-name=n,filename=absent"],
            "option --blockdev: node 'n': Could not open 'absent': No such file or directory",
        ),
        (
            ["daemon", "--object", "tls-creds-psk,id=t"],
            "option --object: object 't': Parameter 'qom-type' does not accept value 'tls-creds-psk'",
        ),
        (
            ["daemon", "--object", "iothread,id=t,aio-max-batch=2"],
            "option --object: iothread 't': 'aio-max-batch': only 0 (chosen by the program) is supported",
        ),
        (
            ["daemon", *NULL, "--export", "nbd,id=e,node-name=n"],
            "option --export: export 'e': NBD server not running",
        ),
        (
            ["daemon", *nbd(), "--export", "nbd,id=e,node-name=n,name=m"],
            "option --export: export 'e': Block export id 'e' is already in use",
        ),
        (
            ["daemon", *nbd(), "--export", "nbd,id=f,node-name=n,name=m,iothread=t"],
            "option --export: export 'f': iothread \"t\" not found",
        ),
        (["daemon", "--pidfile", "no/pid"], "cannot create PID file: Could not create"),
        (["serve"], "serve: exactly one configuration file is expected"),
        (["serve", "absent.yaml"], "absent.yaml: Could not open: No such file or directory"),
    ],
)
def test_errors_are_one_line(run: Run, scratch: Path, words: list[str], line: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"blocktarget: {line}")
    assert done.stderr.count("\n") == 1
    assert os.listdir(scratch) == []


def test_options_act_in_the_order_given(run: Run) -> None:
    raw = ["--blockdev", "raw,node-name=r,file=n"]
    assert run("daemon", *NULL, *raw, "--run", "true").returncode == 0
    done = run("daemon", *raw, *NULL, "--run", "true")
    assert "node 'r': Cannot find device='n' nor node-name='n'" in done.stderr


def test_a_newline_in_a_value_stays_in_the_line(run: Run) -> None:
    done = run("daemon", "--blockdev", "file,node-name=n,filename=a\nb")
    assert done.stderr.count("\n") == 1


# ---- life ----


def test_sigterm_leaves_nothing(spawn: Spawn, scratch: Path) -> None:
    process = spawn("daemon", *nbd(), "--pidfile", "pid")
    assert sorted(os.listdir(scratch)) == ["nbd.sock", "pid"]
    assert (scratch / "pid").read_text() == f"{process.pid}\n"
    assert stop(process) == 0
    assert os.listdir(scratch) == []


def test_sigterm_with_a_client_connected(spawn: Spawn, scratch: Path) -> None:
    process = spawn("daemon", *nbd())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(scratch / "nbd.sock"))
        assert client.recv(8) == b"NBDMAGIC"
        assert stop(process) == 0


def test_sigterm_while_starting(scratch: Path, env: dict[str, str]) -> None:
    for delay in (0.05, 0.15, 0.25, 0.3):
        process = subprocess.Popen(
            blocktarget_argv("daemon", *nbd()), cwd=scratch, env=env, stdout=subprocess.PIPE
        )
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        assert process.returncode in (0, -signal.SIGTERM)
        assert os.listdir(scratch) == []


def test_a_second_pidfile_holder_is_refused(spawn: Spawn, run: Run, scratch: Path) -> None:
    process = spawn("daemon", "--pidfile", "pid")
    done = run("daemon", "--pidfile", "pid")
    assert "cannot create PID file: Failed to lock" in done.stderr
    assert (scratch / "pid").read_text() == f"{process.pid}\n"


def test_the_umask_decides_about_sockets(scratch: Path, spawn: Spawn) -> None:
    before = os.umask(0o077)
    try:
        spawn("daemon", *nbd())
    finally:
        os.umask(before)
    assert stat.S_IMODE((scratch / "nbd.sock").stat().st_mode) == 0o700


def test_a_link_in_place_of_a_socket_is_not_followed(run: Run, scratch: Path) -> None:
    (scratch / "nbd.sock").symlink_to(scratch / "elsewhere")
    assert "nbd.sock: it exists and is not a socket" in run("daemon", *nbd()).stderr
    assert os.listdir(scratch) == ["nbd.sock"]


def test_a_socket_that_is_another_by_now_is_not_removed(spawn: Spawn, scratch: Path) -> None:
    process = spawn("daemon", *nbd())
    path = scratch / "nbd.sock"
    path.unlink()
    path.write_text("not ours")
    assert stop(process) == 0
    assert path.read_text() == "not ours"


def test_inherited_sockets(scratch: Path, env: dict[str, str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(scratch / "own.sock"))
        listener.listen()
        fd = listener.fileno()
        server = ["--nbd-server", f"addr.type=fd,addr.str={fd}"]
        words = [*NULL, *server, "--export", "nbd,id=e,node-name=n", "--run", "nbdinfo --size $(echo $URI)"]
        uri = f"nbd+unix:///n?socket={scratch}/own.sock"
        done = subprocess.run(
            blocktarget_argv("daemon", *words),
            env={**env, "URI": uri},
            pass_fds=[fd],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    assert (done.stdout, done.stderr, done.returncode) == ("1048576\n", "", 0)


def test_counters(spawn: Spawn, scratch: Path) -> None:
    process = spawn("daemon", *nbd())
    uri = f"nbd+unix:///n?socket={scratch}/nbd.sock"
    commands = ["-c", "read 0 64k", "-c", "write 0 4k"]
    subprocess.run(
        ["qemu-io", "-f", "raw", *commands, uri], check=True, stdout=subprocess.DEVNULL, timeout=SECONDS
    )
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    counters = json.loads(process.stdout.readline())
    export = counters["exports"]["e"]
    assert (export["type"], export["node-name"]) == ("nbd", "n")
    assert export["requests"]["read"] >= 1 and export["bytes"]["write"] == 4096
    assert counters["nodes"]["n"]["driver"] == "null-co"
    assert sum(counters["nodes"]["n"]["faults"].values()) == 0
    assert stop(process) == 0


def test_readiness_is_told_to_the_service_manager(spawn: Spawn, scratch: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(SECONDS)
        manager.bind(str(scratch / "notify"))
        process = spawn("daemon", NOTIFY_SOCKET=str(scratch / "notify"))
        assert manager.recv(100) == b"READY=1"
        assert stop(process) == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_a_second_signal_ends_at_once(spawn: Spawn, scratch: Path) -> None:
    process = spawn("daemon", "--blockdev", "null-co,node-name=n,latency-ns=60000000000", *nbd()[2:])
    argv = ["qemu-io", "-f", "raw", "-c", "read 0 512", f"nbd+unix:///n?socket={scratch}/nbd.sock"]
    client = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    client.wait(SECONDS)


# ---- background ----


def test_daemonize(run: Run, scratch: Path) -> None:
    done = run("daemon", *nbd(), "--pidfile", "pid", "--daemonize")
    assert (done.returncode, done.stderr) == (0, "")
    pid = int((scratch / "pid").read_text())
    try:
        uri = f"nbd+unix:///n?socket={scratch}/nbd.sock"
        assert subprocess.check_output(["nbdinfo", "--size", uri], text=True, timeout=SECONDS) == "1048576\n"
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
        assert os.getsid(pid) != os.getsid(0)
    finally:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + SECONDS
    while os.listdir(scratch) and time.monotonic() < end:
        time.sleep(0.02)
    assert os.listdir(scratch) == []


def test_daemonize_shows_errors(run: Run, scratch: Path) -> None:
    done = run("daemon", *nbd(), "--blockdev", "null-co,node-name=n", "--daemonize", "--pidfile", "pid")
    assert done.returncode == 1
    assert done.stderr == "blocktarget: option --blockdev: Duplicate nodes with node-name='n'\n"
    assert os.listdir(scratch) == []


# ---- --run ----


def test_run_exports_variables_and_returns_the_status(run: Run, scratch: Path) -> None:
    command = 'echo "$uri|$unixsocket|$exportname"; nbdinfo --size "$uri"; exit 7'
    done = run("daemon", *nbd(f"{scratch}/nbd.sock"), "--run", command)
    path = f"{scratch}/nbd.sock"
    assert done.stdout == f"nbd+unix:///n?socket={path}|{path}|n\n1048576\n"
    assert (done.returncode, done.stderr) == (7, "")
    assert os.listdir(scratch) == []


def test_run_with_tcp(run: Run) -> None:
    server = ["--nbd-server", "addr.type=inet,addr.host=127.0.0.1,addr.port=0"]
    words = [
        *NULL,
        *server,
        "--export",
        "nbd,id=e,node-name=n",
        "--run",
        'nbdinfo --size "nbd://127.0.0.1:$port/n"',
    ]
    done = run("daemon", *words)
    assert (done.stdout, done.returncode) == ("1048576\n", 0)


def test_run_passes_the_signal_that_ended_it(run: Run) -> None:
    assert run("daemon", *NULL, "--run", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_sigterm_ends_the_command(scratch: Path, env: dict[str, str]) -> None:
    words = [*NULL, "--run", f"echo up > {scratch}/up; exec sleep 60"]
    process = subprocess.Popen(blocktarget_argv("daemon", *words), env=env)
    end = time.monotonic() + SECONDS
    while not (scratch / "up").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM


# ---- serve ----

YAML = """
objects:
  - {qom-type: iothread, id: io0, poll-max-ns: 1000}
images:
  - {driver: raw, filename: disk.raw, size: 2M}
blockdevs:
  - {driver: file, node-name: f, filename: disk.raw, cache: {no-flush: on}, detect-zeroes: on}
  - {driver: raw, node-name: r, file: f, size: 1M}
nbd-server: {addr: {type: unix, path: a.sock}}
nbd-servers:
  - {addr: {type: inet, host: 127.0.0.1, port: 0}, max-connections: 3}
exports:
  - {type: nbd, id: e, node-name: r, writable: true, iothread: io0}
  - {type: vhost-user-blk, id: v, node-name: r, addr: {type: unix, path: v.sock}}
"""


def test_serve(scratch: Path, run: Run) -> None:
    (scratch / "graph.yaml").write_text(YAML)
    command = 'nbdinfo --size "$uri"; nbdinfo --size "nbd://127.0.0.1:$port/r"; ls'
    for _ in range(2):  # the second time the image exists
        done = run("serve", "graph.yaml", "--run", command)
        assert done.stderr == ""
        assert done.stdout.split() == ["1048576", "1048576", "a.sock", "disk.raw", "graph.yaml", "v.sock"]
        assert (scratch / "disk.raw").stat().st_size == 2 << 20
        (scratch / "disk.raw").write_bytes(b"kept" + bytes((2 << 20) - 4))
    assert (scratch / "disk.raw").read_bytes()[:4] == b"kept"


def test_serve_adds_servers_and_exports(scratch: Path, run: Run) -> None:
    (scratch / "graph.yaml").write_text("blockdevs: [{driver: null-co, node-name: n, size: 1M}]")
    words = ["--nbd-server", "addr.type=unix,addr.path=a.sock", "--export", "nbd,id=e,node-name=n"]
    done = run("serve", "graph.yaml", *words, "--run", 'nbdinfo --size "$uri"')
    assert (done.stdout, done.stderr) == ("1048576\n", "")
    done = run("serve", "graph.yaml", *words[2:])
    assert "option --export: export 'e': NBD server not running" in done.stderr


def test_serve_tells_how_to_attach(scratch: Path, env: dict[str, str]) -> None:
    (scratch / "graph.yaml").write_text(YAML)
    argv = blocktarget_argv("serve", "graph.yaml")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=scratch, env=env) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while "blocktarget: ready" not in lines:
            lines.append(process.stdout.readline().rstrip("\n"))
            assert lines[-1], lines
        commands = [line.removeprefix("e: ") for line in lines if line.startswith("e: nbdinfo")]
        assert commands and all(
            subprocess.call(command, shell=True, cwd=scratch) == 0 for command in commands
        )
        assert any(line.startswith("v: qemu-system-x86_64 ") and "v.sock" in line for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    assert sorted(os.listdir(scratch)) == ["disk.raw", "graph.yaml"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "blockdevs: [{driver: null-co, node-name: n, x: 1}]",
            "blockdevs[0]: node 'n': Parameter 'x' is unexpected",
        ),
        ("blockdevs: [{driver: null-co, node-name: n, size: 12Q}]", "Parameter 'size' expects a size"),
        ("exports: [{type: nbd, id: e, node-name: n}]", "exports[0]: export 'e': Cannot find device=''"),
        ("exports: {a: b}", "Invalid parameter type for 'exports', expected: array"),
        ("nodes: []", "Parameter 'nodes' is unexpected"),
        ("blockdevs:\n- driver: raw\n  driver: raw\n", "line 3: 'driver' is given twice"),
        ("images: [{driver: null-co, filename: x, size: 1}]", "driver 'null-co' cannot make images"),
        ("images: [{driver: raw, filename: no/x, size: 1M}]", "image 'no/x': Could not create"),
        ("images: [{driver: raw, filename: x}]", "images[0]: Parameter 'size' is missing"),
        ("- 1", "expected a mapping"),
        ("a: [", "line 1: "),
    ],
)
def test_errors_in_files(scratch: Path, run: Run, text: str, line: str) -> None:
    (scratch / "graph.yaml").write_text(text)
    done = run("serve", "graph.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("blocktarget: graph.yaml: ") and line in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(scratch) == ["graph.yaml"]
