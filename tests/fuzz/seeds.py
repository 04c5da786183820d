# SPDX-License-Identifier: Apache-2.0
"""The first inputs of every fuzz target, made from real structures.

``python -m tests.fuzz.seeds`` writes them into tests/fuzz/corpus, beside inputs that fuzzing has found.
"""

from __future__ import annotations

import random
import struct
from functools import cache

from target.exports.nbd.protocol import (
    CLIENT_FLAGS,
    GREETING,
    IHAVEOPT,
    NBDMAGIC,
    Command,
    CommandFlag,
    Option,
    encode_info_request,
    encode_meta_request,
    encode_option,
    encode_reply,
    encode_request,
)
from target.exports.vhost_user_blk import messages
from target.exports.vhost_user_blk.messages import Request
from tests.fuzz.python.images import BASES, CLUSTER
from tests.fuzz.targets import CORPUS
from tests.fuzz.vhost_seeds import ring_seeds

Seeds = dict[str, bytes]


def numbered(seeds: list[bytes]) -> Seeds:
    return {f"seed-{number:02}": seed for number, seed in enumerate(seeds)}


def mixed(count: int, *parts: bytes, seed: int = 1) -> list[bytes]:
    """Programs of random order from parts that mean something."""
    source = random.Random(seed)
    return [b"".join(source.choices(parts, k=source.randrange(4, 40))) for _ in range(count)]


# ---- C ----


def iov_helpers() -> list[bytes]:
    vectors = [
        bytes([n]) + b"".join(bytes([length, *([fill] * length)]) for length in lengths)
        for n, lengths, fill in ((3, (8, 0, 17), 1), (1, (39,), 4), (5, (1, 1, 1, 30, 2), 0), (0, (), 0))
    ]
    steps = [
        struct.pack("<BHHB", op, offset, length, 3)
        for op in range(4)
        for offset, length in ((0, 8), (5, 20), (40, 1), (0, 519))
    ]
    steps.append(struct.pack("<BHQB", 0x80, 1, (1 << 64) - 1, 4))
    return [head + tail for head in vectors for tail in mixed(4, *steps)]


def map_walk() -> list[bytes]:
    """Geometry, an entry for each granule, then operations; see map_walk.c."""
    turn, load, answer = b"\x0e\x00\x0f\x01", b"\x87\x00\x01", b"\x88\x00\x08"
    write, whole = b"\x81\x01\x10\x02\x00\x03\x00\x42", b"\x81\x41\x00\x08\x00\x08\x00\x33"
    zeroes, discard = b"\x80\x42\x00\x02\x00\x10\x02", b"\x83\x43\x00\x00\x00\x08\x00"
    read, status, flush = (
        b"\x82\x00\x00\x00\x00\x20\x00",
        b"\x80\x45\x00\x00\xff\x7f\x00",
        b"\x81\x04\x00\x00\x00\x00\x00",
    )
    finish, fail, shrink, protect = b"\x84\x01\x00", b"\x84\x07\x00", b"\x89\x00", b"\x8a\x00"
    drain, revoke, grant = b"\x8b\x00", b"\x8c\x01", b"\x8c\x14"
    parts = [
        turn,
        load,
        load,
        answer,
        write,
        whole,
        zeroes,
        discard,
        read,
        status,
        flush,
        finish,
        finish,
        fail,
        shrink,
        protect,
        drain,
        revoke,
        grant,
    ]
    heads = [
        bytes([shape, 15, tail, 1, backing, 0]) + bytes(kinds)
        for shape, tail, backing, kinds in (
            (0, 0, 0, [0] * 16),
            (5, 77, 1, range(16)),
            (0x8A, 0, 99, [2, 4, 5] * 6),
            (0x29, 3, 2, [6, 2, 1, 3] * 4),
        )
    ]
    return [head + program for number, head in enumerate(heads) for program in mixed(8, *parts, seed=number)]


def nbd_session() -> list[bytes]:
    """A mode, then steps; see nbd_session.c."""
    requests = [
        bytes([0xC0, kind, shape, 1, 2, 0x5A]) for kind in range(8) for shape in (0x13, 0x14, 5, 6, 0x90)
    ]
    read = encode_request(Command.READ, 0, 4096, 8192, CommandFlag.DF)
    write = encode_request(Command.WRITE, 0, 512, 64) + b"w" * 64
    raw = [
        b"\xc3" + bytes([len(part)]) + part
        for part in (read, write, read[:9], encode_request(Command.DISC, 0, 0, 0))
    ]
    others = [
        b"\x05\x00",
        b"\x46\xff",
        b"\x06\x08",
        b"\x44\x07",
        b"\x47\x0f",
        b"\x47\x01",
        b"\x47\x12",
        b"\x47\x00",
    ]
    programs = mixed(6, *requests, *raw[:3], *others[:5]) + mixed(2, *requests, *raw, *others, seed=2)
    return [bytes([mode]) + program for mode in (0, 3, 7, 0x2B, 0xC3) for program in programs]


URIS = (
    "nbd://localhost/disk",
    "nbd://[::1]:10809/a%20b",
    "nbd+unix:///disk?socket=/run/nbd.sock",
    "nbd+unix:///?socket=%00abstract",
    "nbd+vsock://2:10809/disk",
    "nbds://user@host/x?tls-type=psk",
)


def nbd_negotiation() -> list[bytes]:
    """A mode, then a URI or replies; see nbd_negotiation.py."""
    infos = [b"\x0b\x01\x00" + struct.pack("<QH", size, 0xDED) for size in (1 << 20, 1 << 63)]
    blocks = b"\x0b\x01\x40\x00\x0c\x19"
    acks = [bytes([option, 0]) for option in range(4)]
    refused = [bytes([option | code << 2, 1, 0xFF, 3]) + b"why" for option in range(4) for code in (4, 8, 9)]
    context = b"\x0e\x01\x81\x03\x00\x00\x00"
    greeting = GREETING.pack(NBDMAGIC, IHAVEOPT, 3)
    proper = [
        b"\x03" + refused[0] + acks[1] + context + acks[2] + infos[0] + blocks + acks[3],
        b"\x03" + acks[0] + acks[2] + infos[0] + acks[3],
        b"\x23" + refused[0] + acks[1] + acks[2],
        b"\x00" + b"\x80\x0a" + struct.pack(">QH", 1 << 20, 1) + b"\x80\x7c" + bytes(124),
        b"\x43" + greeting + encode_reply(Option.EXTENDED_HEADERS, 1),
    ]
    return [
        *(b"\x80" + uri.encode() for uri in URIS),
        *proper,
        *(b"\x03" + program for program in mixed(6, *infos, blocks, *acks, *refused, context, seed=5)),
    ]


def nbd_client() -> list[bytes]:
    """A mode of two bytes, then steps; see nbd_client.c."""
    calls = [bytes([0xC0, 0, how, shape]) for how in range(8) for shape in (0x00, 0x18, 0x3B)]
    long = [bytes([0xC1, 0, how, 0x80, 0xFF, 0x60]) for how in (0, 2)]
    honest, error = b"\xc2\x00\x00\x00", b"\xc2\x00\x00\x04\x01"
    data, hole, spoilt = (
        b"\xc3\x00\x00\x05\x10\x00\x40\x00",
        b"\xc3\x00\x00\x45\x00\x02\x00\x01",
        b"\xc3\x00\x00\x03\x07\x20",
    )
    read, some = b"\xc7\x00", b"\x44\x20"
    loss = [b"\xc5\x01", b"\xc5\x12", b"\xc6\x00", b"\xc5\x10" + bytes(4)]
    answers = [honest, honest, data, hole, error, read, some]
    proper = mixed(6, *calls, *long, *answers, honest, read, seed=3)
    bad = mixed(3, *calls, *long, *answers, spoilt, *loss, seed=4)
    return [
        bytes([mode, more]) + program
        for mode, more, programs in (
            (0x60, 0, proper),
            (0x61, 2, proper),
            (0x63, 7, proper),
            (0x71, 3, bad),
            (0x53, 6, bad),
        )
        for program in programs
    ]


def iscsi_guard() -> list[bytes]:
    """A login that agrees on digests or not, data in one piece and in several, answers, and what goes out."""

    def data_in(itt: int, flags: int, length: int, how: bytes = b"\0") -> bytes:
        return struct.pack("<4BHB", 1, itt, flags, length & 0xFF, length >> 8, 0)[:5] + b"\0" + how

    def other(
        opcode: int, itt: int, status: int = 0, at: int = 0, count: int = 0, data: bytes = b""
    ) -> bytes:
        head = bytes((3, opcode, 0x80, 0, status, len(data), itt, 0xFF))
        return head + struct.pack("<II", at, count) + b"\0" + data + b"\0"

    pull = b"\7"
    sense = b"\0\x12\x70\0\6" + bytes(20)
    sent = bytes((5, 5, 0x80, 0, 0x30)), bytes((5, 1, 0x80, 1, 2)), bytes((5, 0, 0x80, 0, 0))
    seeds = []
    for offers in (0b0000, 0b1111, 0b1010, 0b0101, 0b1100, 0b0011, 0b11100):
        agreed = (2 if offers & 3 else 1) | (2 if offers >> 2 & 3 else 1) << 2
        login = bytes((5, 49, 0x87, 0, agreed, 0)) + pull
        begin = bytes((offers,)) + login
        seeds.append(begin + data_in(0, 0x80, 4096) + data_in(0, 0x81, 4096) + pull + b"".join(sent))
        seeds.append(begin + data_in(1, 0, 5001, b"\4\x88\x13") + pull + other(0x21, 1) + pull)
        seeds.append(
            begin + other(0x31, 2, at=512, count=4096) + other(0x21, 2, 2, data=sense) + pull + sent[0]
        )
        seeds.append(begin + other(0x21, 1) + data_in(1, 0, 5001, b"\4\x88\x13") + pull)
        seeds.append(begin + data_in(3, 0x81, 512, b"\1") + pull + data_in(0, 0, 64, b"\2") + pull)
    return seeds


def nvme_completion() -> list[bytes]:
    """Depth, flags, limits, then steps; see nvme_completion.c."""
    starts = [
        bytes([0, kind | memory, place, how])
        for kind in range(8)
        for memory in (0, 16, 128)
        for place, how in ((kind, 1), (kind + 20, 8))
    ]
    moved = bytes([0, 32, 3, 7, 4]) + bytes([0, 33 | 64, 4, 8, 2, 100])
    turn, time, reset, dead = b"\x05", b"\x0e\xc8", b"\x0f\x01", b"\x0f\x00"
    good, temporary, bad = b"\x08\x00\x00", b"\x08\x01\x01\x06\x00", b"\x08\x02\x01\x81\x42"
    unknown, aborted = b"\x08\x00\x01\x01\x40", b"\x08\x00\x01\x07\x00"
    odd = [
        b"\x0b\x00\x00" + struct.pack("<II", place, value)
        for place, value in ((0, 1), (0, 0x8000), (1, 0), (0xFF, 0), (1 << 16, 0))
    ]
    loose = (
        b"\x0c"
        + struct.pack("<II", 1 << 16, 0)
        + b"\x0d"
        + struct.pack("<IB4s", 1280, 4, b"\x00\x00\x01\x00")
    )
    answers = [turn, good, turn, good, good, temporary, bad, unknown, aborted, time]
    honest = [
        bytes([depth, 0x0F, 0]) + part for depth in (0, 6) for part in mixed(5, *starts, moved, *answers)
    ]
    hostile = [
        bytes([depth, flags, limits]) + part
        for depth, flags, limits in ((0, 0x0F, 0), (6, 0x51, 15), (18, 0x2B, 5))
        for part in mixed(5, *starts, *answers, turn, turn, *odd, loose, reset, dead, seed=depth + 2)
    ]
    return honest + hostile


def vhost_memory() -> list[bytes]:
    def number(kind: int, value: int) -> bytes:
        return struct.pack("<BH", kind, value)

    adds = [
        b"\x00" + number(kind, at) + number(0, size) + number(4, at) + number(0, offset)
        for kind, at, size, offset in (
            (0, 0, 8, 0),
            (0, 8, 8, 8),
            (1, 0, 16, 16),
            (2, 0, 8, 0),
            (0, 4, 90, 0),
            (3, 1, 1, 96),
        )
    ]
    looks = [
        bytes([op]) + number(kind, at) + number(0x40, length) + b"\x07"
        for op in (3, 5)
        for kind, at, length in ((0, 0, 1), (0, 4, 4096), (1, 3, 200), (2, 0, 65535), (0x82, 1, 9))
    ]
    others = [
        b"\x07" + number(0, 0) + number(0, 8) + b"\x01\x00",
        b"\x06" + number(0, 0) + number(0, 9) + b"\x10",
    ]
    return mixed(24, *adds, *looks, *others)


# ---- Python ----


def nbd_options() -> list[bytes]:
    def option(number: int, data: bytes = b"") -> bytes:
        return bytes([number, len(data)]) + data

    info, meta = encode_info_request("disk", [0, 1, 2, 3]), encode_meta_request("disk", ["base:allocation"])
    parts = [
        option(Option.STRUCTURED_REPLY),
        option(Option.LIST),
        option(Option.INFO, info),
        option(Option.GO, info),
        option(Option.SET_META_CONTEXT, meta),
        option(Option.LIST_META_CONTEXT, meta),
        option(Option.STARTTLS),
        option(Option.EXPORT_NAME, b"disk"),
        option(Option.ABORT),
        option(15, b"?"),
        option(Option.GO, info[:9]),
    ]
    single = [bytes([3]) + part for part in parts]
    whole = CLIENT_FLAGS.pack(3) + encode_option(Option.STRUCTURED_REPLY) + encode_option(Option.GO, info)
    return [
        *single,
        *(b"\x03" + program for program in mixed(8, *parts)),
        b"\x80" + whole,
        b"\x80" + whole[:30],
    ]


def vhost_messages() -> list[bytes]:
    """Messages as vhost_messages.py takes them: kind, flags, descriptors, length, payload."""
    kinds = list(Request)

    def message(request: Request, payload: bytes = b"", fds: int = 0, flags: int = 1) -> bytes:
        return bytes([kinds.index(request), flags, fds, len(payload)]) + payload + b"\0"

    def state(request: Request, queue: int, value: int) -> bytes:
        return message(request, messages.VRING_STATE.pack(queue, value))

    region = messages.REGION.pack(0, 4096, 0x7F0000000000, 0)
    negotiate = message(Request.SET_PROTOCOL_FEATURES, messages.U64.pack(0x8229)) + message(Request.SET_OWNER)
    features = message(Request.SET_FEATURES, messages.U64.pack(0x170000E44))
    table = message(Request.SET_MEM_TABLE, messages.MEMORY_HEADER.pack(1, 0) + region, 1)
    add = message(Request.ADD_MEM_REG, bytes(8) + region, 1)
    start = b"".join(
        [
            state(Request.SET_VRING_NUM, 0, 128),
            state(Request.SET_VRING_BASE, 0, 0),
            message(Request.SET_VRING_ADDR, messages.VRING_ADDRESS.pack(0, 0, 1, 2, 3, 0)),
            message(Request.SET_VRING_KICK, messages.U64.pack(0), 1),
            message(Request.SET_VRING_CALL, messages.U64.pack(0), 1),
            state(Request.SET_VRING_ENABLE, 0, 1),
        ]
    )
    config = messages.CONFIG_HEADER.pack(0, 60, 0) + bytes(60)
    parts = [
        message(Request.GET_FEATURES),
        message(Request.GET_CONFIG, config),
        message(Request.GET_QUEUE_NUM),
        message(Request.SET_CONFIG, messages.CONFIG_HEADER.pack(32, 1, 0) + b"\0"),
        state(Request.GET_VRING_BASE, 0, 0),
        message(Request.SET_BACKEND_REQ_FD, b"", 1),
        message(Request.REM_MEM_REG, bytes(8) + region),
        message(Request.RESET_OWNER),
        message(Request.GET_MAX_MEM_SLOTS),
        add,
        table,
        features,
        message(Request.SET_VRING_ERR, messages.U64.pack(0), 1),
        b"\xff" + messages.HEADER.pack(1, 1, 0) + b"\0\0",
    ]
    full = negotiate + features + table + start
    return [b"\x02" + full + part for part in parts] + [
        b"\x07" + full + program for program in mixed(8, *parts)
    ]


def qcow2_header() -> list[bytes]:
    heads = [b"\x30\0" + bytes(base[:CLUSTER]) for base in BASES]
    return heads + [
        b"\0\0" + head[2 : 2 + length]
        for head, length in zip(heads, (4, 24, 71, 72, 104, 112, 200), strict=True)
    ]


def qcow2_image() -> list[bytes]:
    """Small changes of good images: a base, then offset, length, bytes."""
    places = (
        8,
        20,
        24,
        36,
        40,
        48,
        60,
        72,
        80,
        96,
        CLUSTER,
        2 * CLUSTER,
        3 * CLUSTER,
        5 * CLUSTER,
        5 * CLUSTER + 24,
    )
    changed = [
        bytes([0]) + struct.pack("<HB", at, 7) + word
        for at in places
        for word in (b"\xff" * 8, bytes(5) + b"\x40\0\1")
    ]
    return [bytes([number]) for number in range(len(BASES))] + changed


TEXTS = (
    "driver=qcow2,node-name=disk,file.driver=file,file.filename=/x,,y,discard=unmap,cache.direct=on",
    "raw,node-name=r,file=disk,offset=64k,size=1.5G",
    "null-co,size=1T,latency-ns=1000,read-zeroes=on,detect-zeroes=unmap",
    "type=nbd,id=e,node-name=n,name=x,writable=on,bitmaps.0=a,bitmaps.1=b",
    "vhost-user-blk,id=v,node-name=n,addr.type=unix,addr.path=/s,num-queues=2,iothread.0=t0,iothread.1=t1",
    "iothread,id=t0,poll-max-ns=32768",
    "addr.type=inet,addr.host=::1,addr.port=10809,max-connections=5",
    "addr.type=fd,addr.str=3",
    "driver=raw,filename=a.img,size=10G",
    "help",
    "file,help,?",
    "a.0=1,a.2=3",
    "a=1,a.b=2",
)
OBJECTS = (
    '"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": "x", "locking": "auto"}}',
    '"driver": "raw", "file": "d", "offset": 512, "size": 1024}',
    '"type": "nbd", "id": "e", "node-name": "n", "bitmaps": ["a", {"node": "n", "name": "b"}]}',
    '"type": "vhost-user-blk", "id": "e", "node-name": "n", "addr": {"type": "unix", "path": "s"}}',
    '"qom-type": "iothread", "id": "t", "poll-max-ns": 0}',
    '"addr": {"type": "inet", "host": "h", "port": "1"}, "max-connections": 1e3}',
    '"driver": "qcow2", "size": 18446744073709551616, "filename": "\\ud800"}',
    '"a": ' * 40 + "1",
    '"driver": null}',
    "}",
)
FILES = (
    "objects: [{qom-type: iothread, id: t}]\nexports: [{type: nbd, id: e, node-name: n}]\n",
    "blockdevs:\n- driver: raw\n  node-name: n\n  file: {driver: file, filename: x, cache: {direct: on}}\n",
    "images: [{driver: qcow2, filename: x, size: 10G, cluster-size: 64k}]\n",
    "nbd-server: {addr: {type: inet, host: localhost, port: 10809}}\nnbd-servers: []\n",
    "blockdevs: &a\n- {<<: *a}\n",
    "objects: 2001-12-14t21:59:43.10-05:00\n",
    "objects: [0x1F, 0o17, 0b1, 1_000, 1:30, .inf, 1e3, ~, yes]\n",
    "%YAML 1.1\n---\n!!map {objects: !!seq [!!str x, !!int 3, !!binary aGk=, !!set {a}]}\n...\n",
    "objects: |\n  text\nexports: >-\n  folded\n",
    "? [a, b]\n: c\n",
    "objects: [{a: 1, a: 2}]\n",
)


def made_up(seed: int, size: int = 60) -> list[bytes]:
    source = random.Random(seed)
    return [bytes([0x80 | number]) + source.randbytes(size) for number in range(12)]


def keyval_options() -> list[bytes]:
    return [bytes([number % 5]) + text.encode() for number, text in enumerate(TEXTS)] + made_up(1)


def json_options() -> list[bytes]:
    return [bytes([number % 5]) + text.encode() for number, text in enumerate(OBJECTS)] + made_up(2)


def yaml_options() -> list[bytes]:
    return [b"\0" + text.encode() for text in FILES] + made_up(3) + made_up(4, 20)


def qmp_stream() -> list[bytes]:
    """Commands, and parts of them in odd places, in pieces of several sizes."""
    commands = [
        b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}\n',
        b'{"exec-oob":"query-version","id":{"a":[null,true,1.5e3]}}',
        b"{'execute':'query-version'}\r\n",
        b'{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"n",'
        b'"file":{"driver":"null-co","size":18446744073709551616,"read-zeroes":null}}}',
        b'{"execute":"blockdev-reopen","arguments":{"options":[{"driver":"raw","file":"x","offset":-1}]}}',
        b'{"execute":"chardev-add","arguments":{"id":"c","backend":{"type":"null","data":{}}}}',
        b'{"execute":"transaction","arguments":{"actions":[{"type":"abort","data":{}}]}}',
    ]
    parts = [
        b'"\\ud83d\\ude00\\n"',
        b"\xff",
        b"]",
        b"}",
        b"[",
        b"{",
        b'"',
        b"\\",
        b"-0",
        b"1e400 ",
        b"'a\"'",
        b"\x01",
    ]
    return [b"\xff" + each for each in commands] + mixed(20, *commands, *parts)


def reservations() -> list[bytes]:
    """Answers as devices give them (SPC-4 sections 6.15.2 to 6.15.5), the kind of each before it."""
    iscsi = b"\x45\0\0\x0ciqn.a,i,0x1\0"
    sas = bytes.fromhex("0600000050000000000000010000000000000000")
    one, two = (
        struct.pack(">Q4xBB4xHI", key, flags, kind, 1, len(name)) + name
        for key, flags, kind, name in ((1, 1, 6, iscsi), (2, 2, 0, sas))
    )
    keys = struct.pack(">IIQQ", 7, 16, 1, 2)
    held = bytes.fromhex("00000009 00000010 00000000000000ab 00000000 00 05 0000")
    fixed = bytes.fromhex("70000600 0000000a 00000000 2a03 00000000")
    answers = [
        *((0, keys), (0, keys[:20]), (0, bytes(8)), (1, held), (1, bytes(8)), (1, held[:20])),
        *((2, bytes.fromhex("00081581ea010000")), (2, bytes(8)), (4, fixed), (4, b"\x72\6\x2a\3\0\0\0\0")),
        *((0x83, one + two), (0x83, two[:30]), (0x83, one + one), (0x80, keys), (0x81, held[8:])),
        *((3, struct.pack(">II", 0, 0xFFFFFFFF) + one), (4, b"\x70\0\5"), (4, b"\xff" * 18)),
    ]
    return [bytes((kind,)) + answer for kind, answer in answers]


@cache
def all_seeds() -> dict[str, Seeds]:
    """By target, the files of its corpus."""
    makers = (
        iov_helpers,
        iscsi_guard,
        map_walk,
        nbd_client,
        nbd_negotiation,
        nbd_session,
        nvme_completion,
        vhost_memory,
        nbd_options,
        vhost_messages,
        qcow2_header,
        qcow2_image,
        keyval_options,
        json_options,
        yaml_options,
        qmp_stream,
        reservations,
    )
    return {maker.__name__: numbered(maker()) for maker in makers} | {"vhost_ring": numbered(ring_seeds())}


def main() -> None:
    for target, seeds in all_seeds().items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("seed-*"):
            old.unlink()
        for name, data in seeds.items():
            (directory / name).write_bytes(data)


if __name__ == "__main__":
    main()
