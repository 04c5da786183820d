# SPDX-License-Identifier: Apache-2.0
"""QEMU's own client for people, and monitors on standard input and from the YAML file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.daemon import blocktarget_argv
from tests.support.qmp import Qmp, qmp_daemon
from tests.support.tools import run


def test_qmp_shell(scratch: Path) -> None:
    shell = Path(sys.executable).with_name("qmp-shell")
    lines = [
        "object-add qom-type=iothread id=io7",
        "blockdev-add driver=raw node-name=r file.driver=null-co",
        "query-iothreads",
        "nix",
    ]
    with qmp_daemon(scratch / "q"):
        done = run(shell, scratch / "q", input="\n".join(lines) + "\n")
        with Qmp(scratch / "q") as qmp:
            assert [item["id"] for item in qmp.execute("query-iothreads")] == ["io7"]
            qmp.execute("blockdev-del", node_name="r")
    assert "The command nix has not been found" in done.stdout
    assert '"id": "io7"' in done.stdout


def test_standard_input(scratch: Path) -> None:
    """What the process itself prints is kept apart from the answers."""
    script = "".join(json.dumps({"execute": name}) for name in ("qmp_capabilities", "query-chardev", "quit"))
    argv = blocktarget_argv("daemon", "--chardev", "stdio,id=c", "--monitor", "c")
    done = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=30, cwd=scratch)
    assert done.returncode == 0
    greeting, *answers = map(json.loads, done.stdout.splitlines())
    assert "QMP" in greeting
    devices = [{"label": "c", "filename": "stdio", "frontend-open": True}]
    assert answers == [{"return": {}}, {"return": devices}, {"return": {}}]
    assert done.stderr == "blocktarget: ready\n"


def test_not_in_the_background(scratch: Path) -> None:
    done = run(*blocktarget_argv("daemon", "--chardev", "stdio,id=c", "--daemonize"), check=False, timeout=30)
    assert done.returncode == 1
    assert "cannot use stdio with --daemonize" in done.stderr


def test_the_yaml_file_and_the_options_of_serve(scratch: Path) -> None:
    (scratch / "graph.yaml").write_text(
        f"chardevs: [{{backend: socket, id: a, path: {scratch}/a, server: true, wait: false}}]\n"
        "monitors: [{chardev: a, pretty: true}]\n"
        "blockdevs: [{driver: null-co, node-name: n, size: 1M}]\n"
    )
    second = ["--chardev", f"socket,id=b,path={scratch}/b,server=on,wait=off", "--monitor", "b"]
    argv = blocktarget_argv("serve", scratch / "graph.yaml", *second)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocktarget: ready\n"
        with Qmp(scratch / "b") as qmp:
            assert [item["label"] for item in qmp.execute("query-chardev")] == ["a", "b"]
            qmp.execute("quit")
        assert process.wait(30) == 0
    assert not (scratch / "a").exists()


def test_a_socket_of_the_service_manager(scratch: Path) -> None:
    """As systemd passes it: descriptor 3, the number of them, their names."""
    script = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + ".new")
listener.listen()
os.rename(sys.argv[1] + ".new", sys.argv[1])
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="monitor")
os.execv(sys.argv[2], sys.argv[2:])
"""
    argv = blocktarget_argv(
        "daemon", "--chardev", "socket,id=c,fd=monitor,server=on,wait=off", "--monitor", "c"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(scratch / "q"), *argv]) as process:
        while not (scratch / "q").exists():
            assert process.poll() is None
        with Qmp(scratch / "q") as qmp:
            qmp.execute("quit")
        assert process.wait(30) == 0


def test_a_mistake_in_the_yaml_file(scratch: Path) -> None:
    (scratch / "graph.yaml").write_text("chardevs: [{backend: socket, id: a}]")
    done = run(*blocktarget_argv("serve", scratch / "graph.yaml"), check=False, timeout=30)
    assert "chardevs[0]: chardev 'a': One of 'path', 'fd' or 'host' option required." in done.stderr
