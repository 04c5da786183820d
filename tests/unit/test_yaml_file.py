# SPDX-License-Identifier: Apache-2.0
"""The YAML file: order, notations, and that nothing but an OptionError comes of bad text."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from target.config.options import OptionError
from target.config.yaml_file import LISTS, parse_config

FILE = """
exports: [{type: nbd, id: e, node-name: n}]
nbd-server: {addr: {type: unix, path: s}}
nbd-servers: [{addr: {type: inet, host: localhost, port: 10809}}]
blockdevs:
- {driver: raw, node-name: n, file: m}
- {driver: null-co, node-name: m, size: 1.5G, read-zeroes: on, detect-zeroes: off}
images: [{driver: raw, filename: x, size: 4k}]
objects: [{qom-type: iothread, id: t}]
"""


def test_entries_come_in_the_order_of_execution() -> None:
    assert [entry.where for entry in parse_config(FILE)] == [
        "objects[0]",
        "images[0]",
        "blockdevs[0]",
        "blockdevs[1]",
        "nbd-servers[0]",
        "nbd-servers[1]",
        "exports[0]",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "? [1, 2]\n: 3",
        "? {a: b}\n: 3",
        "1: 2",
        "blockdevs: 2020-01-01",
        "blockdevs: [null]",
        "blockdevs: [[]]",
        "blockdevs: [{driver: [1]}]",
        "blockdevs: [{driver: raw, node-name: 2020-01-01, file: x}]",
        "objects: [{qom-type: [], id: x}]",
        "exports: [{type: {}, id: x}]",
        "images: [{driver: raw, filename: x, size: {}}]",
        "nbd-server: 3",
        "nbd-server: {addr: {type: [1]}}",
        "a: &a [*a]",
        "blockdevs: &a [*a]",
        "--- 1\n--- 2",
        "\x00",
        "[" * 5000,
    ],
)
def test_bad_files(text: str) -> None:
    with pytest.raises(OptionError) as info:
        parse_config(text)
    assert str(info.value)


@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    try:
        parse_config(text)
    except OptionError as error:
        assert str(error)


WORDS = st.sampled_from(
    ["driver", "raw", "file", "null-co", "type", "nbd", "id", "addr", "unix", "size", "on", "qom-type"]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from([*LISTS, "nbd-server"]), VALUES | st.lists(VALUES, max_size=2), max_size=3
    )
)
def test_any_tree(tree: dict[str, Any]) -> None:
    try:
        parse_config(yaml.safe_dump(tree))
    except OptionError as error:
        assert str(error)


@pytest.mark.parametrize(
    "scalar",
    [
        *("2001-99-99", "0x_", "0b_", "9" * 5000),
        *("!!int ''", "!!float ''", "!!timestamp x", "!!bool x", "!!set [1]"),
    ],
)
def test_scalar_that_its_tag_does_not_fit(scalar: str) -> None:
    """PyYAML raises ValueError, IndexError, KeyError, AttributeError and TypeError for these."""
    with pytest.raises(OptionError, match=r"^line 1: "):
        parse_config(f"objects: {scalar}")
