# SPDX-License-Identifier: Apache-2.0
"""The guest of guest_image.py with Python in it, so that the target itself runs inside of a guest.

It holds the interpreter that runs this file and its standard library, both where the host has them, and the
packages that the target needs in /site. All is compiled. The target, which changes often, comes with the
job: see `target_files`. A guest needs MEMORY_MIB and a processor that numpy accepts: CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import py_compile
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import guest_image
from guest_image import Cpio, GuestImage, locked

MEMORY_MIB = 1024
CPU = "max"
PACKAGES = ("_cffi_backend", "msgspec", "numpy", "uvloop", "yaml", "_yaml", "backports.zstd")
LEFT_OUT = {
    *("__pycache__", "dist-packages", "site-packages", "test", "tests"),
    *("distutils", "ensurepip", "f2py", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo"),
}
ROOT = Path(__file__).resolve().parents[1]
INTERPRETER = Path(os.path.realpath(sys.executable))
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
SITE, TARGET = "site", "blocktarget"  # directories of the guest
# What a job begins with.
ENVIRONMENT = f"""\
export PYTHONPATH=/{TARGET}:/{SITE} PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1 HOME=/tmp
ln -s {INTERPRETER} /bin/python3
ip link set lo up
"""
COMMAND = b"""#!/bin/python3
import sys
from target.cli.main import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Layer:
    """Files of the guest: where each is here, by its name there."""

    sources: dict[str, Path]
    libraries: dict[str, Path]

    def stamp(self) -> list[tuple[str, int, int]]:
        """What the layer is made of; it changes when a file does."""
        every = {**self.sources, **self.libraries}
        found = ((name, path.stat()) for name, path in sorted(every.items()))
        return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def files_below(top: Path) -> Iterator[Path]:
    """Modules, extensions and other files of a package, without its tests."""
    for directory, below, names in os.walk(top):
        below[:] = sorted(name for name in below if name not in LEFT_OUT and not name.startswith("config-"))
        yield from (Path(directory, name) for name in sorted(names) if not unused(name))


def unused(name: str) -> bool:
    return name.startswith("_tkinter.") or name.endswith((".pyc", ".pyi", ".pyx", ".pxd", ".a", ".h", ".c"))


def package_files(name: str) -> dict[str, Path]:
    """A package or module by its place below /site, with the shared libraries that its wheel brought."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # not even the package that it lies in
        spec = None
    if spec is None or spec.origin is None:
        return {}
    home = Path(spec.origin).parent
    if spec.submodule_search_locations is None:
        return {f"{SITE}/{Path(spec.origin).name}": Path(spec.origin)}
    base = home.parents[name.count(".")]
    tops = [home, *(path for path in [base / f"{name}.libs"] if path.exists())]
    return {f"{SITE}/{path.relative_to(base)}": path for top in tops for path in files_below(top)}


def python_layer() -> Layer:
    sources = {str(path).lstrip("/"): path for path in files_below(STANDARD_LIBRARY)}
    for name in PACKAGES:
        sources |= package_files(name)
    sources[str(INTERPRETER).lstrip("/")] = INTERPRETER
    held = {path.resolve() for path in sources.values()}
    objects = [path for name, path in sources.items() if path == INTERPRETER or ".so" in Path(name).name]
    libraries = {
        str(path).lstrip("/"): path for path in shared_libraries(objects) if path.resolve() not in held
    }
    return Layer(sources, libraries)


def shared_libraries(objects: list[Path]) -> list[Path]:
    """What these need, as ldd finds it. A part of the standard library may need what is not installed."""
    done = subprocess.run(["ldd", *objects], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return sorted({Path(path) for path in re.findall(r"(?:^|\s)(/\S+) \(0x", done.stdout)})


def compiled(name: str, path: Path, scratch: Path) -> bytes:
    """The byte code of a module. It is used without a look at the source, which the guest does not have."""
    out = scratch / "module.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(path), str(out), f"/{name}", doraise=True, invalidation_mode=mode)
    return out.read_bytes()


def add_file(archive: Cpio, name: str, path: Path, scratch: Path) -> None:
    if name.endswith(".py"):
        archive.file(f"{name}c", compiled(name, path, scratch))
    else:
        archive.file(name, path.read_bytes(), executable=os.access(path, os.X_OK))


def build(directory: Path) -> GuestImage:
    """Builds the image in `directory`, or returns the one that is there. Both share guest_image's files."""
    base = guest_image.build(directory)
    image = GuestImage(base.kernel, directory / "python.cpio")
    stamp = directory / "python.json"
    layer = python_layer()
    with locked(directory / "python.lock"):
        wanted = recipe(base, layer)
        if stamp.exists() and stamp.read_text() == wanted:
            return image
        stamp.unlink(missing_ok=True)
        archive = Cpio()
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            for name, path in {**layer.sources, **layer.libraries}.items():
                add_file(archive, name, path, Path(scratch))
        image.initramfs.write_bytes(base.initramfs.read_bytes() + archive.finish())
        stamp.write_text(wanted)
    return image


def recipe(base: GuestImage, layer: Layer) -> str:
    this = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made = base.initramfs.stat().st_mtime_ns
    return json.dumps({"builder": this, "base": made, "version": sys.version, "files": layer.stamp()})


def target_files() -> dict[str, bytes]:
    """The target as it is now, as the command `blocktarget` and /blocktarget, for `GuestImage.with_job`."""
    package = list(files_below(ROOT / "target"))
    found = {f"{TARGET}/{path.relative_to(ROOT)}": path.read_bytes() for path in package}
    extensions = [path for path in package if path.suffix == ".so"]
    if not extensions:
        raise RuntimeError("the extension target/datapath/_datapath.*.so is not built: run scripts/test")
    for library in shared_libraries(extensions):
        found[str(library).lstrip("/")] = library.read_bytes()
    found[f"{TARGET}/scripts/vfio-bind"] = (ROOT / "scripts/vfio-bind").read_bytes()
    return {"bin/blocktarget": COMMAND, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the guest kernel and an initramfs with Python.")
    parser.add_argument("directory", type=Path)
    image = build(parser.parse_args().directory)
    print(image.kernel, image.initramfs)


if __name__ == "__main__":
    main()
