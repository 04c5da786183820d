# SPDX-License-Identifier: Apache-2.0
"""Builds the optional extension ``target.datapath._iscsi`` (cffi, API mode), which needs libiscsi's headers.

It is not linked with the core: see ../device_api.h. ``python target/datapath/iscsi/build.py`` builds it into
the source tree.
"""

import os
import pathlib
import re
import shlex
import subprocess

from cffi import FFI

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


def available() -> bool:
    """Whether libiscsi's headers are here."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    words = [*compiler, "-E", "-x", "c", "-o", os.devnull, "-"]
    try:
        done = subprocess.run(words, input=b"#include <iscsi/iscsi.h>\n", capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def interface() -> str:
    """What cffi reads of initiator.h: plain declarations between two markers."""
    match = re.search(
        r"/\* cffi: begin.*?\*/(.*)/\* cffi: end \*/", (HERE / "initiator.h").read_text(), re.DOTALL
    )
    assert match is not None
    return match.group(1)


def builder() -> FFI:
    extra = shlex.split(os.environ.get("BLOCKTARGET_CFLAGS", ""))
    ffi = FFI()
    ffi.cdef(interface())
    ffi.set_source(
        "target.datapath._iscsi",
        '#include "initiator.h"\n',
        sources=sorted(str(c.relative_to(ROOT)) for c in HERE.glob("*.c")),
        depends=sorted(str(h.relative_to(ROOT)) for h in [*HERE.glob("*.h"), *HERE.parent.glob("*.h")]),
        include_dirs=[str(HERE.relative_to(ROOT)), str(HERE.parent.relative_to(ROOT))],
        libraries=["iscsi", "pthread"],
        extra_compile_args=[*FLAGS, *extra],
        extra_link_args=extra,
    )
    return ffi


ffibuilder = builder()


def main() -> None:
    os.chdir(ROOT)
    ffibuilder.compile(target="_iscsi.abi3.*", verbose=bool(os.environ.get("BLOCKTARGET_VERBOSE")))


if __name__ == "__main__":
    main()
