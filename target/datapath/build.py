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

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


def declarations(header: str) -> str:
    """The part of datapath.h that cffi reads: plain declarations between its two markers."""
    match = re.search(r"/\* cffi: begin.*?\*/(.*)/\* cffi: end \*/", header, re.DOTALL)
    if match is None:
        raise ValueError("datapath.h lacks its cffi markers")
    return match.group(1)


def builder() -> FFI:
    extra = shlex.split(os.environ.get("BLOCKTARGET_CFLAGS", ""))
    ffi = FFI()
    ffi.cdef(declarations((HERE / "datapath.h").read_text()))
    ffi.set_source(
        "target.datapath._datapath",
        '#include "datapath.h"',
        sources=sorted(str(c.relative_to(ROOT)) for c in HERE.glob("*.c") if c.name != "_datapath.c"),
        depends=sorted(str(h.relative_to(ROOT)) for h in HERE.glob("*.h")),
        include_dirs=[str(HERE.relative_to(ROOT))],
        libraries=["uring", "pthread"],
        extra_compile_args=[*FLAGS, *extra],
        extra_link_args=extra,
    )
    return ffi


ffibuilder = builder()


def main() -> None:
    os.chdir(ROOT)
    ffibuilder.compile(target="_datapath.abi3.*", verbose=bool(os.environ.get("BLOCKTARGET_VERBOSE")))


if __name__ == "__main__":
    main()
