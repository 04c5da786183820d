# SPDX-License-Identifier: Apache-2.0
"""Odd messages to qemu-storage-daemon and to us: the same answers, but for a list of differences."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.qmp import Qmp, monitor_argv, qmp_daemon

Json = dict[str, Any]
END = b'\xff\n{"execute":"query-commands","id":"the end"}'
VERSION = b'{"execute":"query-version","id":9}'


def add(**options: Any) -> bytes:
    named = {name.replace("_", "-"): value for name, value in options.items()}
    return json.dumps({"execute": "blockdev-add", "arguments": named}).encode()


def reopen(*options: Any) -> bytes:
    return json.dumps({"execute": "blockdev-reopen", "arguments": {"options": options}}).encode()


def null(**options: Any) -> bytes:
    return add(driver="null-co", node_name="a", **options)


# Sent after capabilities were negotiated, without oob.
NO_REFERENCES: tuple[Any, ...] = (5, None, [], True)
NO_SIZES: tuple[Any, ...] = (1 << 63, 1 << 64, -(1 << 70), 1.5, "1", True, None, [], {})
NO_CACHES: tuple[Any, ...] = ("x", {"direct": 1}, {"x": 1}, [])
CASES: list[bytes] = [
    # not a command
    *(b"1 ", b'"x"', b"[]", b"null ", b"nul ", b"{}", b'{"id":1}', b'{"execute":1}', b'{"execute":1,"id":2}'),
    *(b'{"execute":"query-version","x":1,"id":3}', b'{"execute":"query-version","arguments":1}'),
    *(b'{"execute":"query-version","arguments":null}', b'{"execute":"query-version","arguments":{"a":1}}'),
    *(b'{"exec-oob":"query-version"}', b'{"execute":"a","exec-oob":"b"}', b'{"execute":"nope","id":1}'),
    *(b'{"execute":""}', b'{"arguments":{}}', b'{"id":1,"id":2}', b'{"execute":"qmp_capabilities"}'),
    # ids
    b'{"execute":"query-version","id":{"a":[1,2.50,"\\u00e9\\ud83d\\ude00"]}}',
    *(b'{"execute":"query-version","id":%b}' % id for id in (b"null", b"[]", b"-0", b"1E5", b"0.1")),
    *(b'{"execute":"query-version","id":%d}' % id for id in (1 << 63, (1 << 64) - 1, 1 << 64)),
    # the grammar
    *(b"{'execute':'query-version'}", b"{'execute':'query\\'s\"'}", b'{"execute":"que\\u0072y-version"}'),
    *(b'{"execute" "x"}', b'{"execute":"x",}', b"{,}", b'{"a":}', b"[1 2]", b"[1,]", b"}", b"]", b":", b","),
    *(b"{1:2}", b"{[1]:2}", b"{", b'{"a"', b"[", b'"a', b"[}", b"{]", b"[{]}", b'{"a":1]', b'{"a":1,"a":2}'),
    *(b'{"a":{"b":1,"b":2},"a":3}', b'{"a":tru}', b'{"a":NaN}', b"NaN ", b"Infinity ", b"[tru fals]"),
    # numbers
    *(b"-", b"-{", b"01 ", b"-01 ", b"1.", b"1.{", b"1.e1 ", b"1e ", b"1e+ ", b"+1 ", b".5 ", b"0x10 "),
    # strings
    *(b'"\x01"', b'"\n"', b'{"a":"\n"}', b'"\\x"', b'"\\u12"', b'"\\u12g4"', b'"\\ud800"', b'"\\udc00"'),
    *(b'"\\ud800\\u0041"', b'"\\uffff"', b'"\\ufdd0"', b'"\\u0000"', b'"\\\x01"', b"'\\\"'", b"'a\"'"),
    # UTF-8
    *(b'"\xc0\x80"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\xf0\x9f\x98\x80"', b'"\xf4\x90\x80\x80"'),
    *(b'"\xef\xbf\xbf"', b'"\xfe"', b'"\x80"', b"\xff", b'{"execute":\xff', b"\xc3\xa9", b"\xfe\xff"),
    # not JSON at all
    *(b"\x00", b"{}garbage", b"1_0 ", b'"\xc0\xaf"'),
    *(b"%d", b"%p ", b"[%d]", b"/*", b"//\n", b"GET / HTTP/1.1\r\n\r\n", b"#", b"\\", b"hello world\n"),
    # arguments
    *(null(size=size) for size in NO_SIZES),
    *(null(read_only=value) for value in (1, "on", None)),
    *(null(discard=value) for value in (1, "x", None)),
    *(null(cache=value) for value in NO_CACHES),
    *(add(), add(driver=3), add(driver="nope"), add(driver=None), add(node_name="a")),
    *(add(driver="raw", node_name="a", file=file) for file in NO_REFERENCES),
    add(driver="raw", node_name="a"),
    add(driver="raw", node_name="a", file={"driver": "file"}),
    add(driver="raw", node_name="a", file={"driver": "nope"}),
    add(driver="raw", node_name="a", file={}),
    add(driver="raw", node_name="a", file={"driver": "null-co", "x": 1}),
    add(driver="raw", node_name="a", file="b", x={"y": 1}),
    *(null(x=1), add(driver="null-co")),
    *(add(driver="null-co", node_name=name) for name in (3, "", "é", "1a", "x" * 32)),
    *(reopen(3), reopen({})),
    reopen({"driver": "null-co"}, {"driver": "raw", "file": {"driver": "null-co", "x": 1}}),
    b'{"execute":"blockdev-reopen","arguments":{}}',
    b'{"execute":"blockdev-reopen","arguments":{"options":{}}}',
    *(b'{"execute":"blockdev-del","arguments":{"node-name":"none"}}', b'{"execute":"blockdev-del"}'),
    *(b'{"execute":"object-add","arguments":{"id":"x"}}', b'{"execute":"object-del","arguments":{"id":"x"}}'),
    *(b'{"execute":"object-add","arguments":{"qom-type":"nope","id":"x"}}',),
    *(b'{"execute":"chardev-add","arguments":{"id":"x"}}', b'{"execute":"query-block","arguments":{"x":1}}'),
]  # fmt: skip

# Sent with oob enabled.
OOB_CASES: list[bytes] = [
    *(b'{"exec-oob":"query-version"}', b'{"execute":"a","exec-oob":"b"}', b'{"exec-oob":"a","execute":"b"}'),
    *(b'{"exec-oob":"query-version","execute":3}', b'{"exec-oob":3}', b'{"exec-oob":"nope","id":1}'),
    *(b'{"exec-oob":"qmp_capabilities"}', b'{"exec-oob":"query-version","x":1,"id":7}', VERSION),
]  # fmt: skip

# Sent instead of the negotiation.
FIRST_CASES: list[bytes] = [
    *(VERSION, b'{"execute":"nope"}', b"{}", b"1 ", b'{"exec-oob":"qmp_capabilities"}'),
    *(
        b'{"execute":"qmp_capabilities","arguments":%b}' % arguments
        for arguments in (b'{"enable":["x"]}', b'{"enable":"oob"}', b'{"enable":[1]}', b'{"x":1}', b"{}")
    ),
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob","oob"]}}{"exec-oob":"query-version"}',
]

# What we do otherwise, with the answers that are ours.
DIFFERENCES: dict[bytes, tuple[str, str]] = {
    add(driver="raw", node_name="a", file={"driver": "nope"}): (
        "the peer leaves out where the member is",
        "Parameter 'file.driver' does not accept value 'nope'",
    ),
    b'{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}': (
        "the peer has no name for an element of a list of words",
        "Parameter 'enable[0]' does not accept value 'x'",
    ),
    b'{"execute":"a","exec-oob":"b"}': (
        "the peer goes through the members in the order of their hashes",
        "QMP input member 'exec-oob' clashes with 'execute'",
    ),
    b"\x00": ("the peer shows nothing for it", "JSON parse error, stray '\0'"),
}


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("peer")
    theirs, ours = folder / "theirs", folder / "ours"
    peer = subprocess.Popen(["qemu-storage-daemon", *monitor_argv(theirs)])
    try:
        with qmp_daemon(ours):
            end = time.monotonic() + 20
            while not theirs.exists():
                assert peer.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            yield theirs, ours
    finally:
        peer.terminate()
        peer.wait(20)


def answers(path: Path, data: bytes, first: bytes | None) -> list[str]:
    """What a new client is answered, up to the end; what a version is differs and is left out."""
    with Qmp(path, negotiate=False) as qmp:
        found: list[str] = []
        qmp.send(b"\xff\n" + (first or b"") + data + END)
        while True:
            line = qmp.answer()
            id = line.get("id")
            if id == "the end":
                return found
            if isinstance(id, float) and id.is_integer():
                id = int(id)  # 1E5 comes back as 100000 or as 100000.0
            if "error" in line:
                found.append(f"{line['error']['class']}: {line['error']['desc']} id={id!r}")
            else:
                found.append(f"{'version' if 'qemu' in line['return'] else 'done'} id={id!r}")


NEGOTIATE = b'{"execute":"qmp_capabilities"}'
NEGOTIATE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
ALL = [
    *((NEGOTIATE, case) for case in CASES),
    *((NEGOTIATE_OOB, case) for case in OOB_CASES),
    *((None, case) for case in FIRST_CASES),
]


def test_odd_messages_get_the_answers_of_the_peer(sockets: tuple[Path, Path]) -> None:
    theirs, ours = sockets
    failures = []
    used = set()
    for first, case in ALL:
        their, our = (answers(path, case, first) for path in (theirs, ours))
        if their != our:
            used.add(case)
            text = DIFFERENCES.get(case, ("", "nothing"))[1]
            if f"GenericError: {text} id=None" not in our or len(their) != len(our):
                failures.append(f"{case!r}:\n  {their}\n  {our}")
    assert not failures, "\n".join(failures)
    assert used == set(DIFFERENCES)  # none is left in the list that is none any more
    assert len(ALL) > 150
