# SPDX-License-Identifier: Apache-2.0
"""A process without io_uring, as many containers have it: the system call fails with EPERM."""

from __future__ import annotations

import ctypes
import errno
import struct

IO_URING_SETUP = 425  # on every architecture
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ERRNO, RET_ALLOW = 0x00050000, 0x7FFF0000
# struct sock_filter: load the number; if it is ours, fail with EPERM; else allow.
FILTER = b"".join(
    struct.pack("@HBBI", *row)
    for row in (
        (0x20, 0, 0, 0),
        (0x15, 0, 1, IO_URING_SETUP),
        (0x06, 0, 0, RET_ERRNO | errno.EPERM),
        (0x06, 0, 0, RET_ALLOW),
    )
)


def without_io_uring() -> None:
    """Call it in the child, before the program starts (preexec_fn). Cannot be undone."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(FILTER, len(FILTER))
    head = struct.pack("@HP", len(FILTER) // 8, ctypes.addressof(program))
    zeros = (ctypes.c_ulong(0),) * 3
    if libc.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *zeros):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    if libc.prctl(PR_SET_SECCOMP, mode, ctypes.create_string_buffer(head), *zeros[:2]):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")
