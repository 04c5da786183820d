# SPDX-License-Identifier: Apache-2.0
"""Builds the optional extension ``target.datapath._iscsi`` (cffi, API mode), which needs libiscsi's headers.

It is not linked with the core: see ../device_api.h. ``python target/datapath/iscsi/build.py`` builds it into
the source tree.
"""

import os
import pathlib
import runpy
import shlex
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# The package itself cannot be imported before its extension is built.
core = runpy.run_path(str(HERE.parent / "build.py"))


def available() -> bool:
    """Whether libiscsi's headers are here."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    words = [*compiler, "-E", "-x", "c", "-o", os.devnull, "-"]
    try:
        done = subprocess.run(words, input=b"#include <iscsi/iscsi.h>\n", capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


ffibuilder = core["extension"](
    "_iscsi", HERE, {"initiator.h": core["interface"](HERE / "initiator.h")}, ["iscsi", "pthread"]
)


def main() -> None:
    os.chdir(ROOT)
    ffibuilder.compile(target="_iscsi.abi3.*", verbose=bool(os.environ.get("BLOCKTARGET_VERBOSE")))


if __name__ == "__main__":
    main()
