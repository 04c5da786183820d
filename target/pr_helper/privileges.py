# SPDX-License-Identifier: Apache-2.0
"""Gives up every privilege but CAP_SYS_RAWIO, which SG_IO needs for these commands (capabilities(7))."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd

from target.graph.errors import BlockError

CAP_SYS_RAWIO = 17
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 8, 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def drop(user: str, group: str) -> bool:
    """Becomes the user and the group, where given. Call it before any thread starts.

    Returns whether CAP_SYS_RAWIO is held now. BlockError when the user or the group cannot be had.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    keeps = _has_raw_io(libc)
    uid, gid = _user(user), _group(group)
    try:
        if uid is not None or gid is not None:
            _check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")
            os.setgroups([])
            if gid is not None:
                os.setresgid(gid, gid, gid)
            if uid is not None:
                os.setresuid(uid, uid, uid)
        _set_capabilities(libc, 1 << CAP_SYS_RAWIO if keeps else 0)
        _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    except OSError as error:
        raise BlockError.from_os("pr-helper: privileges cannot be given up", error) from None
    return keeps


def _user(name: str) -> int | None:
    if not name:
        return None
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise BlockError(f"option --user: there is no user '{name}'") from None


def _group(name: str) -> int | None:
    if not name:
        return None
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise BlockError(f"option --group: there is no group '{name}'") from None


def _has_raw_io(libc: ctypes.CDLL) -> bool:
    header, data = _Header(LINUX_CAPABILITY_VERSION_3, 0), (_Data * 2)()
    _check(libc.capget(ctypes.byref(header), data), "capget")
    return bool(data[0].permitted >> CAP_SYS_RAWIO & 1)


def _set_capabilities(libc: ctypes.CDLL, mask: int) -> None:
    header, data = _Header(LINUX_CAPABILITY_VERSION_3, 0), (_Data * 2)()
    data[0].effective = data[0].permitted = mask
    _check(libc.capset(ctypes.byref(header), data), "capset")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
