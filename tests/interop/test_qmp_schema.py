# SPDX-License-Identifier: Apache-2.0
"""query-qmp-schema against what the daemon does: calls made from it get the answers that it promises."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.qmp import Json, Qmp, qmp_daemon
from tests.support.qmp_calls import Call, Schema

pytestmark = pytest.mark.timeout(300)

# Errors about the form of arguments, which a call made from the schema never gets.
FORM = re.compile(
    r"Parameter '[^']*' is (missing|unexpected)$"
    r"|Invalid parameter type for "
    r"|Parameter '[^']*' does not accept value "
    r"|QMP input "
    r"|Internal error"
)
# Commands that a right call of would end the conversation, with the test that calls them.
ENDING = {"quit": "test_qmp.py"}
# Strings that must lead nowhere, so that right calls have no effect outside; others are "none".
TEXTS = {
    "host": "127.0.0.1",
    "port": "1",
    "portal": "127.0.0.1:1",
    "target": "iqn.2000-01.none:none",
    "transport": "tcp",
}
PATHS = ("filename", "path", "file", "out", "in", "device", "script", "logfile", "snapshot-file", "plugin")


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("schema") / "qmp"
    with qmp_daemon(path):
        yield path


@pytest.fixture
def qmp(socket: Path) -> Iterator[Qmp]:
    with Qmp(socket) as client:
        yield client


@pytest.fixture
def schema(qmp: Qmp) -> Schema:
    def text(member: str) -> str:
        return "/nonexistent/none" if member in PATHS else TEXTS.get(member, "none")

    return Schema(qmp.execute("query-qmp-schema"), text)


def test_it_names_the_commands_that_there_are(qmp: Qmp, schema: Schema) -> None:
    names = [entry["name"] for entry in qmp.execute("query-commands")]
    assert schema.commands() == names
    assert {"query-version", "query-qmp-schema", "quit", "qmp_capabilities"} <= set(names)


def test_it_is_whole_and_describes_itself(qmp: Qmp, schema: Schema) -> None:
    """Each name that is used is there once, and entries have the members that the schema gives SchemaInfo."""
    answer = qmp.execute("query-qmp-schema")
    assert len(schema.infos) == len(answer)
    used = {"query-qmp-schema"}
    for info in answer:
        used |= {info[key] for key in ("arg-type", "ret-type", "element-type") if key in info}
        for part in (*info.get("members", []), *info.get("variants", [])):
            if "type" in part:
                used.add(part["type"])
    assert used <= set(schema.infos)
    element = schema.infos[schema.infos["query-qmp-schema"]["ret-type"]]["element-type"]
    kinds = {v["case"]: schema.infos[v["type"]]["members"] for v in schema.infos[element]["variants"]}
    for info in answer:
        members = {"name": {}, "meta-type": {}, **{m["name"]: m for m in kinds[info["meta-type"]]}}
        assert set(info) <= set(members), info
        assert {name for name, m in members.items() if "default" not in m} <= set(info), info


def test_calls_made_from_it_get_the_promised_answers(qmp: Qmp, schema: Schema) -> None:
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for calls in batches(schema):
        qmp.send(b"".join(message(call) for call in calls))
        for call in calls:
            counts[call.what] += 1
            failures += check(call, qmp.answer())
    assert not failures, f"{len(failures)} wrong answers:\n" + "\n".join(failures[:40])
    assert counts["least"] > 20 and counts["full"] > 40 and counts["missing"] > 40, counts
    assert counts["wrong type"] > 500 and counts["unknown"] > 60, counts


def batches(schema: Schema) -> Iterator[tuple[Call, ...]]:
    """All calls but those that end the conversation; as many at once as fit into a socket's buffer."""
    calls = (
        call
        for command in schema.commands()
        for call in schema.calls(command)
        if command not in ENDING or call.error is not None
    )
    while batch := tuple(itertools.islice(calls, 40)):
        yield batch


def message(call: Call) -> bytes:
    return json.dumps({"execute": call.command, "arguments": call.arguments, "id": call.what}).encode()


def check(call: Call, answer: Json) -> list[str]:
    """What is wrong with the answer."""
    assert answer["id"] == call.what
    error = answer.get("error", {"class": "", "desc": ""})
    text = error["desc"]
    if call.error is None:
        right = error["class"] != "CommandNotFound" or call.command == "qmp_capabilities"
        right = right and not FORM.match(text)
    else:
        right = error["class"] == "GenericError" and text.startswith(call.error)
    return [] if right else [f"{call.what}: {call.error} -> {answer}: {call.command} {call.arguments}"]
