# SPDX-License-Identifier: Apache-2.0
"""Builds the small Linux guest of the tests and of `scripts/run --guest`.

The kernel is the one of Debian's linux-image-cloud-amd64, downloaded and unpacked, never installed. The
initramfs holds busybox, the modules for virtio and NBD (loaded at boot), modules that a job loads with
modprobe, and a few programs with their shared libraries.
A job (a shell script) comes in a second archive that is appended to it, so the image is built once.

It does not run QEMU: see guest_vm.py. Needs: apt-get, dpkg, depmod (kmod), lz4, busybox-static, e2fsprogs,
nbd-client.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "nbd")
# For jobs that ask: `modprobe vfio-pci`.
MORE_MODULES = ("vfio-pci", "vfio_iommu_type1", "vsock_loopback", "iscsi_tcp", "sd_mod")
PROGRAMS = ("/sbin/mke2fs", "/sbin/e2fsck", "/sbin/nbd-client", "/usr/sbin/nbd-client")
BUSYBOX = ("/bin/busybox", "/usr/bin/busybox")
# Offsets in the bzImage header: Documentation/x86/boot.rst, "The Real-Mode Kernel Header".
SETUP_SECTS, PAYLOAD_OFFSET, PAYLOAD_LENGTH = 0x1F1, 0x248, 0x24C

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt
/bin/busybox --install -s /bin
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo 40 > /proc/sys/kernel/hung_task_timeout_secs
while read -r module; do insmod "$module"; done < /modules/order
sh /job
echo "GUEST-EXIT: $?"
sync
poweroff -f
"""


@dataclass(frozen=True)
class GuestImage:
    """A bootable pair: `kernel` is an uncompressed ELF, `initramfs` runs the script `/job` it is given."""

    kernel: Path
    initramfs: Path

    def with_job(self, script: str, path: Path, files: Mapping[str, bytes] | None = None) -> Path:
        """Writes to `path` the initramfs with `script` as its /job and more files by name, and returns it."""
        archive = Cpio()
        archive.file("job", script.encode(), executable=True)
        for name, data in (files or {}).items():
            archive.file(name, data, executable=True)
        with self.initramfs.open("rb") as base, path.open("wb") as out:
            shutil.copyfileobj(base, out)
            out.write(archive.finish())
        return path


class Cpio:
    """A cpio archive in the "newc" format of Documentation/driver-api/early-userspace/buffer-format.rst."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        encoded = name.encode() + b"\0"
        fields = (len(self._names) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + encoded, data):
            self._parts.append(part + b"\0" * (-len(part) % 4))
        self._names.add(name)

    def directory(self, name: str) -> None:
        """Adds the directory and those above it, each once."""
        parts = name.split("/")
        for count in range(1, len(parts) + 1):
            path = "/".join(parts[:count])
            if path and path not in self._names:
                self._add(path, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        if name in self._names:
            return
        self.directory(name.rpartition("/")[0])
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def symlink(self, name: str, target: str) -> None:
        self.directory(name.rpartition("/")[0])
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


def run(*argv: str | os.PathLike[str], cwd: Path | None = None) -> str:
    """The output of a program; its error text is in the exception when it fails."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def kernel_package() -> str:
    """The name of the package that the meta package stands for, such as linux-image-6.1.0-50-cloud-amd64."""
    depends = run("apt-cache", "depends", KERNEL_META_PACKAGE)
    found = re.search(r"^\s*Depends: (linux-image-\S+)", depends, re.M)
    if not found:
        raise RuntimeError(f"apt knows no {KERNEL_META_PACKAGE}: run apt-get update")
    return found.group(1)


def unpack_kernel(package: str, directory: Path) -> Path:
    """Downloads and unpacks the kernel package below `directory`; returns the root of its files."""
    root = directory / "kernel"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    # The sandbox user of apt may not write into the directory.
    run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package, cwd=root)
    (archive,) = root.glob("*.deb")
    run("dpkg", "-x", archive, root)
    archive.unlink()
    return root


def extract_vmlinux(bzimage: Path, output: Path) -> None:
    """Writes the ELF inside of a bzImage: it boots faster than the image that unpacks itself."""
    data = bzimage.read_bytes()

    def field(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 4], "little")

    start = (data[SETUP_SECTS] + 1) * 512 + field(PAYLOAD_OFFSET)
    # The kernel's build appends the unpacked size, which the lz4 tool would take for garbage.
    payload = data[start : start + field(PAYLOAD_LENGTH) - 4]
    done = subprocess.run(["lz4", "-d", "-c"], input=payload, capture_output=True)
    if done.returncode or not done.stdout.startswith(b"\x7fELF"):
        raise RuntimeError(f"{bzimage.name}: no LZ4 payload with an ELF inside: {done.stderr.decode()}")
    output.write_bytes(done.stdout)


class ModuleTree:
    """The modules of an unpacked kernel package."""

    def __init__(self, root: Path) -> None:
        (self.path,) = (root / "lib/modules").iterdir()
        run("depmod", "-b", root, self.path.name)
        self.needs: dict[str, list[str]] = {}
        for line in (self.path / "modules.dep").read_text().splitlines():
            path, _, rest = line.partition(":")
            self.needs[path] = rest.split()
        self._by_name = {Path(path).name.partition(".")[0]: path for path in self.needs}

    def closure(self, names: Sequence[str]) -> list[str]:
        """Paths of these modules and of what they depend on, in the order in which they can be loaded."""
        order: list[str] = []
        for name in names:
            path = self._by_name[name]
            # modules.dep lists what a module needs with the deepest last.
            order += [item for item in (*reversed(self.needs[path]), path) if item not in order]
        return order


def libraries(program: Path) -> list[Path]:
    """The shared libraries and the loader of a program, as ldd finds them."""
    return [Path(path) for path in re.findall(r"(?:^|\s)(/\S+) \(0x", run("ldd", program))]


def first_existing(paths: tuple[str, ...]) -> Path:
    for path in paths:
        if Path(path).exists():
            return Path(path)
    raise RuntimeError(f"none of {', '.join(paths)} exists")


def add_modules(archive: Cpio, tree: ModuleTree) -> None:
    """MODULES with the order in which init loads them, and all of them where modprobe looks."""
    at_boot = tree.closure(MODULES)
    home = f"lib/modules/{tree.path.name}"
    held = tree.closure((*MODULES, *MORE_MODULES))
    for path in held:
        archive.file(f"{home}/{path}", (tree.path / path).read_bytes())
    needs = "".join(f"{path}: {' '.join(tree.needs[path])}\n" for path in held)
    archive.file(f"{home}/modules.dep", needs.encode())
    archive.file("modules/order", "".join(f"/{home}/{path}\n" for path in at_boot).encode())


def build_initramfs(root: Path, output: Path) -> None:
    archive = Cpio()
    archive.file("init", INIT.encode(), executable=True)
    archive.file("bin/busybox", first_existing(BUSYBOX).read_bytes(), executable=True)
    archive.symlink("bin/sh", "busybox")
    add_modules(archive, ModuleTree(root))
    for program in [path for path in map(Path, PROGRAMS) if path.exists()]:
        archive.file(f"sbin/{program.name}", program.read_bytes(), executable=True)
        for library in libraries(program):
            archive.file(str(library).lstrip("/"), library.read_bytes(), executable=True)
    archive.symlink("sbin/mkfs.ext4", "mke2fs")
    archive.file("etc/mke2fs.conf", Path("/etc/mke2fs.conf").read_bytes())
    archive.symlink("etc/mtab", "/proc/mounts")
    output.write_bytes(archive.finish())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that two builds in one directory follow each other."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def recipe(package: str) -> str:
    """What the image is made of: when this text changes it is built anew."""
    sources = [*PROGRAMS, *BUSYBOX]
    stamps = {path: os.stat(path).st_mtime_ns for path in sources if os.path.exists(path)}
    this = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return json.dumps({"package": package, "files": stamps, "builder": this}, sort_keys=True)


def build(directory: Path) -> GuestImage:
    """Builds the image in `directory`, or returns the one that is there."""
    directory.mkdir(parents=True, exist_ok=True)
    image = GuestImage(directory / "vmlinux", directory / "initramfs.cpio")
    stamp = directory / "recipe.json"
    with locked(directory / "lock"):
        package = kernel_package()
        wanted = recipe(package)
        if stamp.exists() and stamp.read_text() == wanted:
            return image
        stamp.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            root = unpack_kernel(package, Path(scratch))
            extract_vmlinux(next((root / "boot").glob("vmlinuz-*")), image.kernel)
            build_initramfs(root, image.initramfs)
        stamp.write_text(wanted)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the guest kernel and initramfs.")
    parser.add_argument("directory", type=Path)
    image = build(parser.parse_args().directory)
    print(image.kernel, image.initramfs)


if __name__ == "__main__":
    main()
