# SPDX-License-Identifier: Apache-2.0
"""blocktarget ctl with this target, and with qemu-storage-daemon, whose schema hides the names of types."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import blocktarget_argv
from tests.support.qmp import monitor_argv, qmp_daemon
from tests.support.tools import Completed, run

Ctl = Callable[..., Completed]
SECONDS = 20


@pytest.fixture
def ctl(scratch: Path) -> Iterator[Ctl]:
    """ctl(*words) runs the client against a target with two monitors: plain and pretty answers."""
    pretty = monitor_argv(scratch / "pretty", id="second", monitor=",pretty=on")
    with qmp_daemon(scratch / "q", *pretty):
        yield lambda *words, check=True, input="": client(
            "--socket", scratch / "q", *words, check=check, input=input
        )


def client(*words: str | Path, check: bool = True, input: str = "") -> Completed:
    return run(*blocktarget_argv("ctl", *words), check=check, timeout=SECONDS, input=input)


def test_commands_with_typed_arguments(ctl: Ctl) -> None:
    assert ctl("object-add", "qom-type=iothread", "id=io0", "poll-max-ns=64k").stdout == ""
    assert (
        ctl("blockdev-add", "driver=raw", "node-name=r", "file.driver=null-co", "file.size=1M").stdout == ""
    )
    nodes = json.loads(ctl("--json", "query-named-block-nodes", "flat=on").stdout)["return"]
    sizes = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
    assert sizes["r"] == 1 << 20
    ctl("blockdev-add", '{"driver": "null-co", "node-name": "n,comma"}', check=False)
    ctl("blockdev-reopen", "options.0.driver=raw", "options.0.node-name=r", "options.0.file=" + _child(nodes))
    ctl("transaction", 'actions=[{"type": "blockdev-del", "data": {"node-name": "r"}}]')
    assert "r" not in ctl("query-named-block-nodes").stdout.split()


def _child(nodes: list[dict[str, str]]) -> str:
    return next(node["node-name"] for node in nodes if node["drv"] == "null-co")


def test_tables_and_outlines(ctl: Ctl) -> None:
    lines = ctl("query-chardev").stdout.splitlines()
    assert lines[0].split() == ["label", "filename", "frontend-open"]
    assert lines[1].split()[0] == "mon"
    assert lines[1].split()[-1] == "yes"
    assert "qemu:\n  major: " in ctl("query-version").stdout
    assert ctl("qom-get", "path=/chardevs/mon", "property=connected").stdout == "yes\n"


def test_a_pretty_monitor_says_the_same(ctl: Ctl, scratch: Path) -> None:
    plain = ctl("qom-list-types").stdout
    assert client("-s", scratch / "pretty", "qom-list-types").stdout == plain


def test_errors(ctl: Ctl, scratch: Path) -> None:
    done = ctl("object-del", "id=nix", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "blocktarget: GenericError: object 'nix' not found\n"
    done = ctl("--json", "nix", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["class"] == "CommandNotFound"
    for words, message in (
        (("object-del", "nix"), "'nix': expected name=value"),
        (("query-named-block-nodes", "flat=maybe"), "Parameter 'flat' expects 'on' or 'off', not 'maybe'"),
        (("block_resize", "node-name=r", "size=lots"), "Parameter 'size' expects a number, not 'lots'"),
        (("object-del", "{"), "JSON parse error"),
        (("--fd", "x", "add-fd"), "option '--fd' expects a number, not 'x'"),
        (("--nix",), "unrecognized option '--nix'"),
        (("help", "nix"), "The command nix has not been found"),
    ):
        done = ctl(*words, check=False)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = client("-s", scratch / "absent", "query-version", check=False)
    assert done.returncode == 1
    assert done.stderr == f"blocktarget: Could not connect to '{scratch}/absent': No such file or directory\n"


def test_the_socket_from_the_environment(ctl: Ctl, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKTARGET_SOCKET", str(scratch / "pretty"))
    assert "blocktarget" in client("query-version").stdout
    monkeypatch.delenv("BLOCKTARGET_SOCKET")
    (scratch / "blocktarget").mkdir()
    (scratch / "blocktarget" / "qmp.sock").symlink_to(scratch / "q")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(scratch))
    assert "blocktarget" in client("query-version").stdout


def test_a_script_ends_at_the_first_failure(ctl: Ctl) -> None:
    done = ctl(check=False, input="query-version  # a comment\n\nnix\nquery-chardev\n")
    assert done.returncode == 1
    assert "qemu:" in done.stdout
    assert "label" not in done.stdout
    assert (
        ctl(input="object-add qom-type=iothread id='io1'\nquery-iothreads\nexit\nnix\n").stdout.count("io1")
        == 1
    )


def test_descriptors(ctl: Ctl, scratch: Path) -> None:
    with (scratch / "file").open("w") as file:
        argv = blocktarget_argv("ctl", "-s", scratch / "q", "--fd", str(file.fileno()), "--json")
        argv += ["add-fd", "fdset-id=4", "opaque=12"]
        done = subprocess.run(argv, pass_fds=[file.fileno()], capture_output=True, text=True, timeout=SECONDS)
    assert json.loads(done.stdout)["return"]["fdset-id"] == 4


def test_events(ctl: Ctl, scratch: Path) -> None:
    done = ctl("events", "--timeout", "0.2", check=False)
    assert done.returncode == 1
    server = ["addr.type=unix", f"addr.data.path={scratch}/nbd"]
    ctl("nbd-server-start", *server)
    ctl("blockdev-add", "driver=null-co", "node-name=n")
    argv = blocktarget_argv("ctl", "-s", scratch / "q", "events", "BLOCK_EXPORT_DELETED", "--count", "1")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as listener:
        end = time.monotonic() + SECONDS
        while listener.poll() is None:  # the first ones may come before it listens
            assert time.monotonic() < end
            ctl("block-export-add", "type=nbd", "id=e", "node-name=n")
            ctl("block-export-del", "id=e")
        assert listener.stdout is not None
        assert listener.stdout.read().split()[1:] == ["BLOCK_EXPORT_DELETED", "id=e"]
        assert listener.wait(SECONDS) == 0


def test_help(ctl: Ctl) -> None:
    assert "query-chardev-backends" in ctl("commands", "chardev").stdout.split()
    text = ctl("help", "blockdev-add").stdout
    assert "\n  with driver=file:\n    filename" in text
    assert "[read-only]" in text


COMPLETIONS = [
    ("query-chard", ["query-chardev", "query-chardev-backends"]),
    ("object-del ", ["id="]),
    ("blockdev-add driver=nu", ["driver=null-aio", "driver=null-co"]),
    ("blockdev-add driver=raw fi", ["file.", "file="]),
    ("blockdev-add driver=raw file.driver=file file.aio=n", ["file.aio=native"]),
    ("blockdev-add driver=file filename=x fil", []),
    ("query-named-block-nodes flat=o", ["flat=off", "flat=on"]),
    ("transaction actions.0.type=ab", ["actions.0.type=abort"]),
    ("transaction actions.0.type=object-del actions.0.data.", ["actions.0.data.id="]),
    ("--js", ["--json"]),
    ("nix ", []),
]


def test_completion(ctl: Ctl, scratch: Path) -> None:
    for line, wanted in COMPLETIONS:
        found = ctl("--complete", f"blocktarget ctl -s {scratch}/q {line}").stdout.split()
        assert found == wanted, line


def test_completion_in_bash(ctl: Ctl, scratch: Path) -> None:
    words = f"blocktarget ctl --socket {scratch}/q blockdev-add driver=nu"
    script = f"""
        blocktarget() {{ {" ".join(map(str, blocktarget_argv()))} "$@"; }}
        source <(blocktarget ctl --completion bash)
        compopt() {{ :; }}
        COMP_LINE='{words}' COMP_POINT={len(words)} COMP_WORDS=({words})
        _blocktarget
        echo "${{COMPREPLY[@]}}"
    """
    assert run("bash", "-c", script).stdout.split() == ["null-aio", "null-co"]


def test_completion_at_a_terminal(ctl: Ctl, scratch: Path) -> None:
    master, slave = pty.openpty()
    argv = blocktarget_argv("ctl", "-s", scratch / "q")
    env = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=env) as shell:
        os.close(slave)
        seen = b""

        def until(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                seen += os.read(master, 1000)

        until(b"blocktarget> ")
        os.write(master, b"query-vers\t\r")
        until(b"package: blocktarget")
        os.write(master, b"nix\r")
        until(b"has not been found")
        os.write(master, b"exit\r")
        assert shell.wait(SECONDS) == 0
    os.close(master)


def test_another_server(scratch: Path) -> None:
    argv = ["qemu-storage-daemon", *monitor_argv(scratch / "q"), "--pidfile", str(scratch / "pid")]
    with subprocess.Popen(argv) as server:
        try:
            while not (scratch / "pid").exists():
                assert server.poll() is None
                time.sleep(0.02)
            client(
                "-s",
                scratch / "q",
                "blockdev-add",
                "driver=null-co",
                "node-name=n",
                "size=1M",
                "read-zeroes=on",
            )
            shown = client("-s", scratch / "q", "-j", "query-named-block-nodes", "flat=true").stdout
            assert json.loads(shown)["return"][0]["image"]["virtual-size"] == 1 << 20
            line = f"blocktarget ctl -s {scratch}/q blockdev-add driver=raw file.driver=file file.aio=n"
            assert client("--complete", line).stdout.split() == ["file.aio=native"]
        finally:
            server.kill()
