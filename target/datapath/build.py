# SPDX-License-Identifier: Apache-2.0
"""Builds the extension ``target.datapath._datapath`` (cffi, API mode) from the C files beside this one.

``python target/datapath/build.py`` builds it into the source tree. BLOCKTARGET_CFLAGS adds flags for
compiler and linker, for sanitizer builds: see scripts/test-sanitized.
"""

import os
import pathlib
import re
import shlex

from cffi import FFI

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


def interface(header: pathlib.Path) -> str | None:
    """What cffi reads of a header: plain declarations between two markers. None when there are no markers."""
    match = re.search(r"/\* cffi: begin.*?\*/(.*)/\* cffi: end \*/", header.read_text(), re.DOTALL)
    return match.group(1) if match else None


def interfaces() -> dict[str, str]:
    """Headers with a part for Python: datapath.h, which the others include, then those of devices."""
    headers = sorted(HERE.glob("*.h"), key=lambda header: (header.name != "datapath.h", header.name))
    found = {header.name: interface(header) for header in headers}
    return {name: text for name, text in found.items() if text is not None}


def extension(name: str, folder: pathlib.Path, headers: dict[str, str], libraries: list[str]) -> FFI:
    """An extension of this package from the C files of a folder, which may include the headers here."""
    extra = shlex.split(os.environ.get("BLOCKTARGET_CFLAGS", ""))
    folders = list(dict.fromkeys([folder, HERE]))
    ffi = FFI()
    for text in headers.values():
        ffi.cdef(text)
    ffi.set_source(
        f"target.datapath.{name}",
        "".join(f'#include "{header}"\n' for header in headers),
        sources=sorted(str(c.relative_to(ROOT)) for c in folder.glob("*.c") if not c.name.startswith("_")),
        depends=sorted(str(h.relative_to(ROOT)) for f in folders for h in f.glob("*.h")),
        include_dirs=[str(f.relative_to(ROOT)) for f in folders],
        libraries=libraries,
        extra_compile_args=[*FLAGS, *extra],
        extra_link_args=extra,
    )
    return ffi


ffibuilder = extension("_datapath", HERE, interfaces(), ["uring", "pthread"])


def main() -> None:
    os.chdir(ROOT)
    ffibuilder.compile(target="_datapath.abi3.*", verbose=bool(os.environ.get("BLOCKTARGET_VERBOSE")))


if __name__ == "__main__":
    main()
