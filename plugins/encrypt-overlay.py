# SPDX-License-Identifier: Apache-2.0
"""An encrypted disk in a file or on a block device: an nbdkit plugin.

    nbdkit python encrypt-overlay.py file=disk.enc size=10G passphrase=+secret.txt     (makes a new one)
    nbdkit python encrypt-overlay.py file=disk.enc passphrase=+secret.txt [discard=true]

file        where the encrypted bytes lie
passphrase  as nbdkit reads passwords: the text itself, +FILE, -FD, or - to be asked
keyfile     instead of a passphrase: a file whose whole content is the secret
size        of the disk. Makes the file where it does not exist or is empty; otherwise it must be right
discard     whether trimmed sectors are freed; who has the file then sees which ones are unused

The first 4 KiB are a header: salt, cost of the key derivation (scrypt), and a MAC over these, by which a
wrong passphrase is told from a right one. Then come the sectors of 4096 bytes, each by itself AES-256-XTS
with its number as the tweak. XTS keeps content secret; it does not notice that somebody has changed the
file, nor that he has put an older copy of a sector back. A sector of which all stored bytes are zero (a hole)
reads as zeros, so that a new disk and a discarded sector need no space.

Needs the Python package cryptography.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import getpass
import hashlib
import hmac
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec

import nbdkit

try:
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import XTS
except ImportError as error:
    raise ImportError(f"encrypt-overlay needs the Python package cryptography: {error}") from None

API_VERSION = 2

SECTOR = 4096
HEADER = 4096
MAGIC = b"BTcrypt1"
FIXED = struct.Struct(">8sIII32s")  # magic, log2 of scrypt's N, its r and p, salt
MAC_SIZE = 32
COST = (15, 8, 1)  # 32 MiB, some tenths of a second
ZEROS = bytes(SECTOR)
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

P = ParamSpec("P")

parameters: dict[str, str] = {}


def config(key: str, value: str) -> None:
    if key not in ("file", "passphrase", "keyfile", "size", "discard"):
        raise ValueError(f"unknown parameter {key!r}")
    if key in parameters:
        raise ValueError(f"the parameter {key} is given twice")
    # nbdkit changes its directory later.
    parameters[key] = os.path.abspath(value) if key in ("file", "keyfile") else value


def config_complete() -> None:
    if "file" not in parameters:
        raise ValueError("the parameter file=FILE is required")
    if ("passphrase" in parameters) == ("keyfile" in parameters):
        raise ValueError("either passphrase=PASSPHRASE or keyfile=FILE is required")
    if parameters.get("discard", "false") not in ("true", "false"):
        raise ValueError("discard=true or discard=false is expected")


# ---- the secret and the header ----


def secret() -> bytes:
    if "keyfile" in parameters:
        with os.fdopen(os.open(parameters["keyfile"], os.O_RDONLY), "rb") as file:
            found = file.read()
    elif hasattr(nbdkit, "read_password"):
        found = nbdkit.read_password(parameters["passphrase"])
    else:
        found = read_password(parameters["passphrase"])
    if not found:
        raise ValueError("the passphrase is empty")
    return found


def read_password(value: str) -> bytes:
    """What nbdkit.read_password does, for an nbdkit that has none."""
    if value == "-":
        return getpass.getpass("passphrase: ").encode()
    if value[:1] not in ("+", "-"):
        return value.encode()
    source = int(value[1:]) if value[0] == "-" else os.open(value[1:], os.O_RDONLY)
    with os.fdopen(source, "rb") as file:
        return file.readline().rstrip(b"\n")


def derive(fixed: bytes) -> tuple[bytes, bytes]:
    """The key of the sectors and the key of the header's MAC. The cost comes from the file: it is bounded."""
    magic, log_n, r, p, salt = FIXED.unpack(fixed)
    if magic != MAGIC or not 10 <= log_n <= 20 or not 1 <= r <= 16 or not 1 <= p <= 16:
        raise ValueError(f"{parameters['file']}: no header of an encrypted disk")
    memory = 256 * r * (2**log_n + p)
    keys = hashlib.scrypt(secret(), salt=salt, n=2**log_n, r=r, p=p, maxmem=memory, dklen=64 + MAC_SIZE)
    return keys[:64], keys[64:]


def unlock(header: bytes) -> bytes:
    """The key of the sectors. ValueError when the passphrase is wrong."""
    fixed, mac = header[: FIXED.size], header[FIXED.size : FIXED.size + MAC_SIZE]
    key, mac_key = derive(fixed)
    if not hmac.compare_digest(hmac.digest(mac_key, fixed, "sha256"), mac):
        raise ValueError(f"{parameters['file']}: the passphrase is wrong, or the header is damaged")
    return key


def format_disk(fd: int, wanted: int) -> None:
    """Writes a header and makes the file as large as the disk needs. All sectors read as zeros."""
    if wanted <= 0 or wanted % SECTOR:
        raise ValueError(f"size={parameters['size']}: a multiple of {SECTOR} is expected")
    fixed = FIXED.pack(MAGIC, *COST, os.urandom(32))
    _, mac_key = derive(fixed)
    header = fixed + hmac.digest(mac_key, fixed, "sha256")
    os.ftruncate(fd, HEADER + wanted)
    os.pwrite(fd, header.ljust(HEADER, b"\0"), 0)
    os.fsync(fd)


# ---- the disk ----


@dataclass
class Disk:
    """What the server has opened."""

    fd: int
    key: bytes
    size: int
    writable: bool
    discard: bool
    # Held by whoever changes sectors: a part of a sector is changed by writing the whole of it.
    changing: threading.Lock


disk: Disk


def get_ready() -> None:
    global disk
    fd, writable = open_file()
    length = os.lseek(fd, 0, os.SEEK_END)
    wanted = nbdkit.parse_size(parameters["size"]) if "size" in parameters else None
    if length == 0 and wanted is not None:
        format_disk(fd, wanted)
        length = os.lseek(fd, 0, os.SEEK_END)
    key = unlock(os.pread(fd, HEADER, 0).ljust(HEADER, b"\0"))
    size = max(length - HEADER, 0) // SECTOR * SECTOR
    if wanted not in (None, size):
        raise ValueError(f"{parameters['file']}: the disk has {size} bytes, not {wanted}")
    disk = Disk(fd, key, size, writable, parameters.get("discard") == "true", threading.Lock())


def open_file() -> tuple[int, bool]:
    """Opens and locks the file, for reading only where nothing else is permitted."""
    path, flags = parameters["file"], os.O_CLOEXEC | (os.O_CREAT if "size" in parameters else 0)
    try:
        fd, writable = os.open(path, os.O_RDWR | flags, 0o600), True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        fd, writable = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
    if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
        raise ValueError(f"{path}: neither a regular file nor a block device")
    try:
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_EX if writable else fcntl.LOCK_SH))
    except BlockingIOError:
        raise ValueError(f"{path}: in use by another process") from None
    return fd, writable


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def open(readonly: bool) -> None:
    return None


def get_size(h: None) -> int:
    return disk.size


def block_size(h: None) -> tuple[int, int, int]:
    return 1, SECTOR, 0xFFFFFFFF


def can_write(h: None) -> bool:
    return disk.writable


def can_multi_conn(h: None) -> bool:
    return True


def can_trim(h: None) -> bool:
    return disk.discard


def can_zero(h: None) -> bool:
    return disk.discard


# ---- sectors ----


def crypt(data: bytes, first: int, decrypt: bool) -> bytes:
    """En- or decrypts whole sectors; first is the number of the first one."""
    return b"".join(
        crypt_sector(data[at : at + SECTOR], first + at // SECTOR, decrypt)
        for at in range(0, len(data), SECTOR)
    )


def crypt_sector(data: bytes, number: int, decrypt: bool) -> bytes:
    if decrypt and data == ZEROS:
        return ZEROS
    cipher = Cipher(AES(disk.key), XTS(number.to_bytes(16, "little")))
    context = cipher.decryptor() if decrypt else cipher.encryptor()
    return bytes(context.update(data) + context.finalize())


def read_sectors(first: int, last: int) -> bytes:
    """Sectors first to last - 1, decrypted."""
    data, end = b"", (last - first) * SECTOR
    while len(data) < end:
        more = os.pread(disk.fd, end - len(data), HEADER + first * SECTOR + len(data))
        if not more:
            raise EOFError("the file has become shorter")
        data += more
    return crypt(data, first, decrypt=True)


def write_sectors(first: int, data: bytes) -> None:
    rest, position = memoryview(crypt(data, first, decrypt=False)), HEADER + first * SECTOR
    while rest:
        count = os.pwrite(disk.fd, rest, position)
        rest, position = rest[count:], position + count


def sectors(count: int, offset: int) -> tuple[int, int]:
    """The sectors that a range touches: the first, and the one after the last."""
    return offset // SECTOR, -(-(offset + count) // SECTOR)


def tells_errno(callback: Callable[P, None]) -> Callable[P, None]:
    """The client gets the error of the storage; an exception alone would be EIO."""

    @functools.wraps(callback)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except OSError as error:
            nbdkit.set_error(error.errno or errno.EIO)
            raise

    return wrapper


@tells_errno
def pread(h: None, buf: memoryview, offset: int, flags: int) -> None:
    first, last = sectors(len(buf), offset)
    start = offset - first * SECTOR
    buf[:] = read_sectors(first, last)[start : start + len(buf)]


@tells_errno
def pwrite(h: None, buf: memoryview, offset: int, flags: int) -> None:
    first, last = sectors(len(buf), offset)
    start = offset - first * SECTOR
    end = start + len(buf)
    with disk.changing:
        before = read_sectors(first, first + 1)[:start] if start else b""
        after = read_sectors(last - 1, last)[end % SECTOR :] if end % SECTOR else b""
        write_sectors(first, b"".join((before, buf, after)))


@tells_errno
def flush(h: None, flags: int) -> None:
    os.fdatasync(disk.fd)


# ---- space ----


def whole(count: int, offset: int) -> tuple[int, int]:
    """The sectors that lie in a range as a whole: the first, and the one after the last."""
    return -(-offset // SECTOR), (offset + count) // SECTOR


def punch(first: int, last: int) -> None:
    """Frees sectors, which then read as zeros. OSError where the storage cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = libc.fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if fallocate(disk.fd, mode, HEADER + first * SECTOR, (last - first) * SECTOR):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@tells_errno
def trim(h: None, count: int, offset: int, flags: int) -> None:
    """Parts of sectors at both ends stay as they are."""
    first, last = whole(count, offset)
    if first >= last:
        return
    with disk.changing:
        punch(first, last)


@tells_errno
def zero(h: None, count: int, offset: int, flags: int) -> None:
    """Whole sectors that may become holes are freed; otherwise nbdkit writes zeros, which are encrypted."""
    first, last = whole(count, offset)
    if not flags & nbdkit.FLAG_MAY_TRIM or first * SECTOR != offset or last * SECTOR != offset + count:
        raise OSError(errno.EOPNOTSUPP, "zeros are written")
    with disk.changing:
        punch(first, last)


def extents(h: None, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
    """Holes of the file are zeros; whether a sector that is stored is all zeros is not looked at."""
    at, end = offset, offset + count
    while at < end:
        data = seek(at, os.SEEK_DATA)
        if data > at:
            yield at, min(data, end) - at, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        at = seek(min(data, end), os.SEEK_HOLE) if data < end else end
        if data < at:
            yield data, min(at, end) - data, 0


def seek(position: int, whence: int) -> int:
    """lseek in the disk's own positions. Past the last data comes the disk's end."""
    try:
        return max(os.lseek(disk.fd, HEADER + position, whence) - HEADER, position)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return disk.size
