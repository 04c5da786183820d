# SPDX-License-Identifier: Apache-2.0
"""Each shipped configuration starts as it is and serves a disk; each driver has one, and a row in docs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import yaml

from target import drivers
from target.graph import registry
from tests.support.daemon import nbd_uri
from tests.support.serve import CONFIGS, serving
from tests.support.tgtd import Account, Tgtd, make_disk
from tests.support.tools import qemu_io, run

Surroundings = Callable[[Path, str], AbstractContextManager[str]]
# Started in test_demo, test_nbdkit_plugins and tests/guest/test_nvme.
ELSEWHERE = {"demo", "nbdkit-plugin", "nvme"}
MIB = 1 << 20


@contextmanager
def nothing(directory: Path, text: str) -> Iterator[str]:
    yield text


def files(**sizes: int) -> Surroundings:
    """Makes empty files, as the comment in the configuration tells its user to."""

    @contextmanager
    def made(directory: Path, text: str) -> Iterator[str]:
        for name, size in sizes.items():
            file = f"{name}.log" if name == "writes" else f"{name}.raw"
            assert file in text
            with (directory / file).open("wb") as out:
                out.truncate(size)
        yield text

    return made


@contextmanager
def block_device(directory: Path, text: str) -> Iterator[str]:
    """Puts a loop device in place of the example."""
    assert "/dev/disk/by-id/EXAMPLE" in text
    image = directory / "loop.raw"
    with image.open("wb") as out:
        out.truncate(64 * MIB)
    device = run("losetup", "--find", "--show", "--direct-io=on", image).stdout.strip()
    try:
        yield text.replace("/dev/disk/by-id/EXAMPLE", device)
    finally:
        run("losetup", "--detach", device)


@contextmanager
def another_server(directory: Path, text: str) -> Iterator[str]:
    """Runs the server that the configuration's comment names."""
    image, socket = directory / "disk.raw", directory / "nbd-source.sock"
    with image.open("wb") as out:
        out.truncate(64 * MIB)
    options = ["--persistent", f"--socket={socket}", "--export-name=disk", "--format=raw"]
    with subprocess.Popen(["qemu-nbd", *options, str(image)]) as server:
        try:
            yield text
        finally:
            server.terminate()


@contextmanager
def iscsi_target(directory: Path, text: str) -> Iterator[str]:
    """The target that the configuration names, which asks for its password, on a port of its own."""
    portal, user, password = "127.0.0.1:3260", "initiator", "secret of twelve"
    assert text.count(portal) == 1
    (directory / "iscsi-password").write_text(password)
    with Tgtd(directory) as tgtd:
        tgtd.add_target(user=Account(user, password))
        tgtd.add_lun(make_disk(directory / "lun", 64 * MIB))
        yield text.replace(portal, tgtd.portal)


SURROUNDINGS: dict[str, Surroundings] = {
    "blkdebug": files(disk=64 * MIB),
    "blklogwrites": files(disk=64 * MIB, writes=64 * MIB),
    "blkverify": files(copy=64 * MIB),
    "copy-before-write": files(disk=64 * MIB, old=64 * MIB),
    "copy-on-read": nothing,
    "file": files(disk=1024 * MIB),
    "host-device": block_device,
    "iscsi": iscsi_target,
    "nbd": another_server,
    "null": nothing,
    "preallocate": nothing,
    "qcow2": nothing,
    "quorum": files(one=64 * MIB, two=64 * MIB, three=64 * MIB),
    "raw": files(disk=128 * MIB),
    "throttle": files(disk=64 * MIB, other=64 * MIB),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_configuration_serves_a_disk(scratch: Path, name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    with SURROUNDINGS[name](scratch, text) as config, serving(config, scratch):
        uri = nbd_uri(scratch / "nbd.sock")
        qemu_io(uri, "write -P 0x5a 4M 64k", "flush")
        if name != "null":
            qemu_io(uri, "read -P 0x5a 4M 64k", "read -P 0 8M 64k")


def test_blkdebug_injects_what_its_configuration_says(scratch: Path) -> None:
    text = (CONFIGS / "blkdebug.yaml").read_text()
    with files(disk=64 * MIB)(scratch, text) as config, serving(config, scratch):
        argv = ["qemu-io", "-f", "raw", nbd_uri(scratch / "nbd.sock"), "-c", "write 1M 4k"]
        failed = subprocess.run(argv, capture_output=True, text=True)
        assert "No space left on device" in failed.stdout + failed.stderr
        qemu_io(nbd_uri(scratch / "nbd.sock"), "write 1M 4k")


def test_no_configuration_is_left_out() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SURROUNDINGS) | ELSEWHERE


def test_each_driver_has_a_configuration_and_a_row_in_the_docs() -> None:
    drivers.load()
    used = {name for path in CONFIGS.glob("*.yaml") for name in drivers_in(yaml.safe_load(path.read_text()))}
    shipped = {n: d for n, d in registry.drivers().items() if d.__module__.startswith("target.")}
    assert {driver.driver for driver in shipped.values()} <= used
    docs = (CONFIGS.parent / "docs/drivers.md").read_text()
    for name in shipped:
        assert f"`{name}`" in docs


def drivers_in(value: object) -> Iterator[str]:
    """The drivers named anywhere in a configuration's nodes."""
    if isinstance(value, dict):
        if isinstance(value.get("driver"), str):
            yield value["driver"]
        for item in value.values():
            yield from drivers_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from drivers_in(item)
