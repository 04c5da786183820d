# SPDX-License-Identifier: Apache-2.0
"""A member of a tar archive as a read-only disk, without unpacking: an nbdkit plugin.

    nbdkit python tar-member.py file=appliance.ova member=disk.vmdk

file    an archive that is not compressed
member  the name as `tar tf` prints it; of several of one name the last counts, as it does when unpacking

Sparse members are refused: their bytes do not lie in one piece. The archive must not change meanwhile.
"""

from __future__ import annotations

import os
import tarfile

import nbdkit

API_VERSION = 2

path = ""
member = ""
fd = -1
start = 0  # of the member's bytes in the archive
size = 0


def config(key: str, value: str) -> None:
    global member, path
    if key == "file":
        path = os.path.abspath(value)  # nbdkit changes its directory later
    elif key == "member":
        member = value
    else:
        raise ValueError(f"unknown parameter {key!r}")


def config_complete() -> None:
    global fd, size, start
    if not path or not member:
        raise ValueError("the parameters file=ARCHIVE and member=NAME are required")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    start, size = find()


def find() -> tuple[int, int]:
    """Where the member's bytes begin, and how many there are."""
    try:
        with os.fdopen(os.dup(fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            info = archive.getmember(member)
    except KeyError:
        raise ValueError(f"{path}: no member {member!r}") from None
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not an uncompressed tar archive: {error}") from None
    if info.issparse():
        raise ValueError(f"{path}: the member {member!r} is sparse")
    if not info.isreg():
        raise ValueError(f"{path}: the member {member!r} is not a regular file")
    if info.offset_data + info.size > os.fstat(fd).st_size:
        raise ValueError(f"{path}: the archive ends inside of the member {member!r}")
    return info.offset_data, info.size


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def cleanup() -> None:
    os.close(fd)


def open(readonly: bool) -> None:
    return None


def export_description(h: None) -> str:
    return f"{member} in {os.path.basename(path)}"


def get_size(h: None) -> int:
    return size


def can_multi_conn(h: None) -> bool:
    return True


def pread(h: None, buf: memoryview, offset: int, flags: int) -> None:
    while buf:
        count = os.preadv(fd, [buf], start + offset)
        if count == 0:
            raise EOFError(f"{path} has become shorter")
        buf, offset = buf[count:], offset + count


def cache(h: None, count: int, offset: int, flags: int) -> None:
    os.posix_fadvise(fd, start + offset, count, os.POSIX_FADV_WILLNEED)
