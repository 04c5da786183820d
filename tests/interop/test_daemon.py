# SPDX-License-Identifier: Apache-2.0
"""The same command lines for this target and for qemu-storage-daemon: both take them, or both refuse.

Where both refuse, our line contains QEMU's words. Differences that are meant are listed, with their reason;
any other is a failure.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from target.cli import daemon, options
from target.cli.errors import UsageError
from target.cli.run import RunOptions, StartError
from target.service import Service
from tests.support.daemon import Daemon, daemon_argv

QEMU = "qemu-storage-daemon"
SECONDS = 20
# Both programs end here when they have taken all options before it.
END = ["--object", "no-such-type,id=end"]
END_MESSAGE = "Parameter 'qom-type' does not accept value 'no-such-type'"

FILE = "--blockdev driver=file,filename=disk.raw,node-name=x"
RAW = "--blockdev driver=raw,node-name=r,file.driver=file,file.filename=disk.raw"
NBD = "--nbd-server addr.type=unix,addr.path=nbd.sock"

SAME = [
    # drivers and their options
    "--blockdev foo",
    "--blockdev driver=foo,node-name=x",
    "--blockdev driver=file",
    "--blockdev driver=file,node-name=x",
    "--blockdev driver=file,node-name=x,filename=absent",
    "--blockdev driver=file,filename=disk.raw",
    "--blockdev driver=file,filename=.,node-name=x",
    "--blockdev driver=file,filename=/dev/null,node-name=x",
    "--blockdev driver=file,filename=disk.raw,node-name=1x",
    "--blockdev driver=file,filename=disk.raw,node-name=" + "a" * 31,
    "--blockdev driver=file,filename=disk.raw,node-name=" + "a" * 32,
    f"{FILE},bar=1",
    f"{FILE},read-only=maybe",
    f"{FILE},read-only=yes",
    f"{FILE},aio=maybe",
    f"{FILE},aio=threads",
    f"{FILE},aio=native",
    f"{FILE},locking=off",
    f"{FILE},locking=on",
    f"{FILE},drop-cache=off",
    f"{FILE},detect-zeroes=on",
    f"{FILE},detect-zeroes=unmap",
    f"{FILE},detect-zeroes=unmap,discard=unmap",
    f"{FILE},discard=foo",
    f"{FILE},cache.foo=1",
    f"{FILE},cache=1",
    f"{FILE},cache.no-flush=on",
    f"{FILE},force-share=on",
    f"{FILE},force-share=on,read-only=on",
    f"{FILE} {FILE}",
    "--blockdev driver=null-co,node-name=n,size=0",
    "--blockdev driver=null-aio,node-name=n,size=4096,latency-ns=10,read-zeroes=on",
    "--blockdev driver=null-co,node-name=n,size=0x1000",
    "--blockdev driver=raw,node-name=r",
    "--blockdev driver=raw,node-name=r,file=nope",
    "--blockdev driver=raw,node-name=r,file.driver=file",
    f"{RAW},file.zz=1",
    f"{RAW},offset=512",
    f"{RAW},offset=100",
    f"{RAW},offset=1048576",
    f"{RAW},offset=1048577",
    f"{RAW},size=1048576",
    f"{RAW},size=1048576,offset=512",
    f"{RAW},size=1000",
    f"{FILE} --blockdev raw,node-name=r,file=x --blockdev raw,node-name=s,file=x",
    # the notation
    "--blockdev ",
    "--blockdev ,",
    "--blockdev file,",
    "--blockdev file,x",
    "--blockdev file,node-name=x,=3",
    "--blockdev file,a.0=1,a.b=1",
    "--blockdev file,a=1,a.b=2",
    "--blockdev file,a..b=1",
    "--blockdev file,1=2",
    "--blockdev [1]",
    '--blockdev {"driver":"file","filename":1,"node-name":"x"}',
    '--blockdev {"driver":"file","filename":"a","node-name":"x","read-only":"on"}',
    '--blockdev {"driver":"file","filename":"disk.raw","node-name":"x","foo":"on"}',
    '--blockdev {"driver":"null-co","node-name":"x","size":4096}',
    '--blockdev {"driver":"null-co","node-name":"x","size":"4096"}',
    '--blockdev {"node-name":"x"}',
    # objects
    "--object iothread",
    "--object iothread,id=a",
    "--object iothread,id=a,poll-max-ns=0",
    "--object iothread,id=a,poll-max-ns=a",
    "--object iothread,id=a,foo=1",
    '--object {"qom-type":"iothread","id":"a"}',
    "--object throttle-group,id=t",
    "--object iothread,id=1a",
    "--object iothread,id=a,poll-max-ns=-1",
    "--object iothread,id=a,poll-grow=3,poll-shrink=2",
    "--object iothread,id=a --object iothread,id=a",
    # character devices and monitors
    "--chardev null",
    "--chardev null,id=c",
    "--chardev null,id=1c",
    "--chardev nix,id=c",
    "--chardev id=c",
    "--chardev socket,id=c,host=a",
    "--chardev socket,id=c,path=c.sock,server=maybe",
    "--chardev socket,id=c,path=no/c.sock,server=on,wait=off",
    "--chardev socket,id=c,path=c.sock,server=on,wait=off,reconnect=1",
    "--chardev socket,id=c,path=absent",
    "--chardev socket,id=c,path=absent,wait=on",
    "--chardev socket,id=c,path=a,delay=on,nodelay=on",
    "--chardev socket,id=c,fd=77",
    "--chardev stdio,id=c,signal=3",
    "--chardev ringbuf,id=c,size=17",
    "--chardev ringbuf,id=c,size=64k",
    "--chardev pty,id=c",
    "--chardev pipe,id=c,path=no/p",
    "--chardev file,id=c,path=no/f",
    "--chardev file,id=c,path=disk.raw,append=on",
    "--chardev socket,id=c,path=c.sock,server=on,wait=off --monitor c",
    "--chardev socket,id=c,path=c.sock,server=on,wait=off --monitor chardev=c,mode=control,pretty=on,id=m",
    "--chardev null,id=c --monitor c --monitor c",
    "--chardev null,id=c --monitor c,mode=readline",
    "--chardev null,id=c --monitor c,mode=nix",
    "--chardev null,id=c --monitor c,pretty=3",
    "--chardev null,id=c --monitor id=c",
    "--monitor nope",
    # the NBD server
    "--nbd-server ",
    "--nbd-server foo",
    "--nbd-server addr.path=x",
    "--nbd-server addr.type=unix",
    "--nbd-server addr.type=unix,addr.path=no/nbd.sock",
    "--nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port=0,max-connections=3",
    "--nbd-server addr.type=fd,addr.str=77",
    # exports
    "--export ",
    "--export nbd",
    "--export id=3",
    "--export foo,id=e,node-name=x",
    f"{FILE} --export nbd,id=e,node-name=x",
    f"{FILE} {NBD} --export nbd,id=e,node-name=y",
    f"{FILE} {NBD} --export nbd,id=e,node-name=x",
    f"{FILE} {NBD} --export nbd,id=e,node-name=x,writable=on,writethrough=on,description=a,,b",
    f"{FILE} {NBD} --export nbd,id=1,node-name=x",
    f"{FILE} {NBD} --export nbd,id=e,node-name=x --export nbd,id=e,node-name=x,name=foo",
    f"{FILE} {NBD} --export nbd,id=e,node-name=x --export nbd,id=f,node-name=x",
    f"{FILE} {NBD} --export nbd,id=e,node-name=x --export nbd,id=f,node-name=x,name=g",
    f"{FILE} {NBD} --export nbd,id=e,node-name=x,iothread=foo",
    f"{FILE} {NBD} --object iothread,id=t --export nbd,id=e,node-name=x,iothread=t,fixed-iothread=on",
    f"{FILE},read-only=on {NBD} --export nbd,id=e,node-name=x",
    f"{FILE},read-only=on {NBD} --export nbd,id=e,node-name=x,writable=on",
    f"{FILE} --export vhost-user-blk,id=v,node-name=x,addr.type=unix,addr.path=v.sock,num-queues=4",
    f"{FILE} --export vhost-user-blk,id=v,node-name=x",
    # permissions
    f"{RAW} {NBD} --export nbd,id=e,node-name=r,writable=on --blockdev raw,node-name=s,file=r,size=512",
    f"--blockdev qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2,file.node-name=f {NBD}"
    " --export nbd,id=e,node-name=f,writable=on",
    f"--blockdev qcow2,node-name=q,file.driver=file,file.filename=disk.qcow2,file.node-name=f {NBD}"
    " --export nbd,id=e,node-name=f",
    # other options
    "--foo",
    "foo",
    "--daemonize=1",
]

# Command line -> (QEMU's words or None when it accepts, ours or None, why).
DIFFERENT: dict[str, tuple[str | None, str | None, str]] = {
    f"{RAW},offset=1k": ("expects integer", None, "sizes take a suffix everywhere"),
    "--blockdev driver=null-co,node-name=n,size=1M": ("expects integer", None, "as above"),
    "--blockdev driver=null-co,node-name=n,size=12Q": ("expects integer", "expects a size", "as above"),
    "--nbd-server addr.type=inet,addr.host=192.0.2.1,addr.port=1": (
        "Failed to bind socket: Cannot assign",
        "Failed to bind socket to 192.0.2.1:1: Cannot assign",
        "the address is named",
    ),
    f"{RAW},size=-1": ("below 2^64", "Parameter 'size': expected", "our words"),
    f"{FILE},x-check-cache-dropped=on": (None, "'x-check-cache-dropped' is unexpected", "a test hook"),
    "--blockdev driver=file,filename=/dev/fdset/3,node-name=x": (
        "dup FD",
        "Failed to find fdset",
        "later words",
    ),
    "--blockdev driver=host_device,filename=disk.raw,node-name=x": (
        "to be either a character or block device",
        "to be a block device",
        "character devices are not served",
    ),
    '--blockdev {"driver":"file"': ("premature EOI", "Input data was truncated", "words of the JSON parser"),
    f"{NBD} --nbd-server addr.type=unix,addr.path=other.sock": (
        "NBD server already running",
        None,
        "several servers may run",
    ),
    "--nbd-server addr.type=foo": (
        "Parameter 'type' does not accept",
        "Parameter 'addr.type' does not accept",
        "the whole path is named",
    ),
    f"{FILE} --export vhost-user-blk,id=v,node-name=x,addr.type=unix,addr.path=v,logical-block-size=100": (
        "doesn't take value 100",
        "'logical-block-size' must be a power of two",
        "our words",
    ),
    "--chardev null,id=c,foo=1": (
        "Invalid parameter 'foo'",
        "Parameter 'foo' is unexpected",
        "as everywhere",
    ),
    "--chardev file,id=c": (
        "chardev: file: no filename given",
        "Parameter 'path' is missing",
        "as everywhere",
    ),
    "--chardev null,id=c --chardev null,id=c": ("duplicate property", "'c' already exists", "as chardev-add"),
    "--chardev udp,id=c,host=127.0.0.1,port=9": (None, "'udp' is not a valid char driver name", "not built"),
    "--chardev socket,id=c,path=c,server=on,wait=off,telnet=on": (
        None,
        "'telnet' is not supported",
        "not built",
    ),
}


@pytest.fixture
def images(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with disk.raw and disk.qcow2, 1 MiB each."""
    monkeypatch.chdir(scratch)
    (scratch / "disk.raw").write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", scratch / "disk.qcow2", "1M"], check=True)
    return scratch


def words_of(line: str) -> list[str]:
    """The arguments of a line. Blanks set off options; their values hold none."""
    return [word for part in re.split(r" (?=--)", line) for word in part.split(" ", 1)]


def theirs(line: str, directory: Path) -> str | None:
    """None when qemu-storage-daemon takes all options, else its error without the prefix."""
    before = set(os.listdir(directory))
    argv = [QEMU, *words_of(line), *END]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=SECONDS, cwd=directory, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1, done.stderr
    for name in set(os.listdir(directory)) - before:  # it leaves sockets behind when it fails
        (directory / name).unlink()
    message = done.stderr.splitlines()[0].removeprefix(f"{QEMU}: ")
    for option, argument in itertools.pairwise(argv):
        message = message.removeprefix(f"{option} {argument}: ")
    return None if message == END_MESSAGE else " ".join(message.split())


def ours(line: str, directory: Path) -> str | None:
    """The same for this target, whose code runs in this process. Nothing may be left behind."""
    before = sorted(os.listdir(directory))
    message = asyncio.run(_carry_out(words_of(line)))
    assert sorted(os.listdir(directory)) == before
    return message


async def _carry_out(words: list[str]) -> str | None:
    actions: list[daemon.Action] = []
    service: Service | None = None
    try:
        given, others = options.split(words, daemon.KNOWN, daemon.SHORT)
        if others:
            raise UsageError(f"{others[0]}: Unexpected argument")
        for option in given:
            daemon.apply(option, RunOptions(), actions)
        service = Service()
        for action in actions:
            await daemon.act(service, action)
    except (UsageError, StartError) as error:
        return str(error)
    finally:
        if service is not None:
            assert await service.close() == []
    return None


@pytest.mark.parametrize("line", SAME)
def test_the_same(images: Path, line: str) -> None:
    wanted, found = theirs(line, images), ours(line, images)
    if wanted is None:
        assert found is None
        return
    assert found is not None, f"only QEMU refuses: {wanted}"
    # QEMU calls every export "an unnamed block device"; we name it.
    pattern = re.escape(wanted).replace(re.escape("an unnamed block device"), "block export '.*'")
    assert re.search(pattern, found), f"QEMU: {wanted}; we: {found}"


@pytest.mark.parametrize("line", DIFFERENT)
def test_differences_that_are_meant(images: Path, line: str) -> None:
    *both, _ = DIFFERENT[line]
    for message, words in zip((theirs(line, images), ours(line, images)), both, strict=True):
        assert (message is None) == (words is None), message
        assert words is None or words in (message or "")


# ---- image locks ----


def locked(image: Path) -> set[int]:
    """The bytes of the image on which there are OFD locks."""
    inode = image.stat().st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, _, _, _, where, first, last = line.split()
        if kind == "OFDLCK" and int(where.split(":")[2]) == inode:
            found.update(range(int(first), int(last) + 1))
    return found


def qcow2(options: str = "") -> list[str]:
    return ["--blockdev", f"qcow2,node-name=n,file.driver=file,file.filename=disk.qcow2{options}"]


def export(options: str) -> list[str]:
    return [
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        f"nbd,id=e,node-name=n,{options}",
    ]


@pytest.mark.parametrize(
    ("image", "argv"),
    [
        ("disk.raw", ["--blockdev", "file,node-name=n,filename=disk.raw"]),
        ("disk.raw", ["--blockdev", "file,node-name=n,filename=disk.raw", *export("writable=off")]),
        (
            "disk.raw",
            ["--blockdev", "file,node-name=n,filename=disk.raw,locking=off", *export("writable=on")],
        ),
        ("disk.qcow2", qcow2()),
        ("disk.qcow2", qcow2(",read-only=on")),
        ("disk.qcow2", qcow2(",read-only=on,force-share=on")),
        ("disk.qcow2", [*qcow2(), *export("writable=on")]),
        ("disk.qcow2", [*qcow2(",read-only=on"), *export("writable=off")]),
    ],
)
def test_locks_are_on_the_same_bytes(images: Path, image: str, argv: list[str]) -> None:
    found: list[set[int]] = []
    for program in ([QEMU], daemon_argv()):
        pidfile = images / "pid"
        process = subprocess.Popen(
            [*program, *argv, "--pidfile", str(pidfile)],
            cwd=images,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + SECONDS
        while not pidfile.exists() and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.02)
        found.append(locked(images / image))
        process.terminate()
        assert process.wait(SECONDS) == 0
        for name in ("pid", "nbd.sock"):
            (images / name).unlink(missing_ok=True)
    assert found[0] == found[1]


def test_a_raw_image_has_one_writer_whichever_program_comes_first(
    images: Path, start: Callable[..., Daemon]
) -> None:
    node = ["--blockdev", f"raw,node-name=n,file.driver=file,file.filename={images}/disk.raw"]
    argv = [*node, "--nbd-server", f"addr.type=unix,addr.path={images}/nbd.sock"]
    start(*argv, "--export", "nbd,id=e,node-name=n,writable=on")
    line = f"{' '.join(node)} --nbd-server addr.type=unix,addr.path=other.sock"
    refused = theirs(f"{line} --export nbd,id=e,node-name=n,writable=on", images)
    assert refused is not None and 'Failed to get "write" lock' in refused
    assert theirs(f"{line} --export nbd,id=e,node-name=n", images) is None


# ---- random options ----

# Not among them: -1, on which qemu-storage-daemon 7.2 aborts, and 010, which it takes as octal.
VALUES = st.sampled_from(["", "0", "1", "0x10", "1 ", " 1", "1e3", "9" * 30, "on", "off", "x", "1.5"])
KEYS = st.sampled_from(["size", "latency-ns", "read-zeroes", "read-only", "discard", "cache.direct", "cache"])
OPTIONS = st.lists(st.tuples(KEYS, VALUES), max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPTIONS)
def test_random_options_are_judged_alike(images: Path, pairs: list[tuple[str, str]]) -> None:
    text = "".join(f",{key}={value}" for key, value in pairs)
    wanted, found = (judge(f"--blockdev null-co,node-name=n{text}", images) for judge in (theirs, ours))
    assert (wanted is None) == (found is None), f"QEMU: {wanted}; we: {found}"
