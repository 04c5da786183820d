# SPDX-License-Identifier: Apache-2.0
"""The key=value notation: QEMU's grammar, escapes, lists and words for errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from target.config.keyval import parse_argument
from target.config.options import Notation, OptionError


def value(text: str, implied: str | None = "driver") -> dict[str, Any]:
    return parse_argument(text, implied).value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", {}),
        ("file", {"driver": "file"}),
        ("file,", {"driver": "file"}),
        ("driver=file", {"driver": "file"}),
        ("a=1,a=2", {"a": "2"}),
        ("a=", {"a": ""}),
        ("a=b=c", {"a": "b=c"}),
        ("a=1,,2,b=,,", {"a": "1,2", "b": ","}),
        ("a=x,,,b=1", {"a": "x,", "b": "1"}),
        ("cache.direct=on,cache.no-flush=off", {"cache": {"direct": "on", "no-flush": "off"}}),
        ("c.0=x,c.1.driver=file", {"c": ["x", {"driver": "file"}]}),
        ("c.1=b,c.0=a", {"c": ["a", "b"]}),
        ("[1]", {"driver": "[1]"}),
    ],
)
def test_grammar(text: str, wanted: dict[str, Any]) -> None:
    assert value(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,x", "Expected '=' after parameter 'x'"),
        ("file,=3", "Invalid parameter ''"),
        (",", "Invalid parameter ''"),
        ("file,a..b=1", "Invalid parameter 'a..b'"),
        ("file,1=2", "Invalid parameter '1'"),
        ("file,a.0=1,a.b=1", "Parameters 'a.*' used inconsistently"),
        ("file,a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
        ("file,a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
        ("q,children.1=a", "Parameter 'children.0' missing"),
        ("file,a.0=1,a.999999999=1", "Parameter 'a.1' missing"),
        ("x" * 128 + "=1", "Parameter '" + "x" * 128 + "' is too long"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError) as info:
        value(text)
    assert str(info.value) == message


def test_a_first_value_needs_an_implied_key() -> None:
    with pytest.raises(OptionError, match="Expected '=' after parameter 'file'"):
        value("file", implied=None)


@pytest.mark.parametrize("text", ["help", "file,help", "file,a=1,?", "help,file=1"])
def test_help_is_a_word_by_itself(text: str) -> None:
    assert parse_argument(text, "driver").help


@pytest.mark.parametrize("text", ["file,help=1", "helpful", "a=help"])
def test_what_is_not_help(text: str) -> None:
    assert not parse_argument(text, "driver").help


def test_braces_mean_json() -> None:
    argument = parse_argument('{"a": {"b": [1, true, "x"]}}', "driver")
    assert argument.value == {"a": {"b": [1, True, "x"]}}
    assert argument.notation is Notation.JSON


@pytest.mark.parametrize("text", ["{", '{"a":}', "{}x", '{"a": "\\ud800"}', '{"a":' * 100_000])
def test_bad_json(text: str) -> None:
    with pytest.raises(OptionError, match="JSON parse error"):
        value(text)


NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True).filter(lambda name: name != "help")
TREES = st.recursive(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: (
        st.dictionaries(NAMES, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def flatten(tree: Any, path: str = "") -> list[str]:
    if isinstance(tree, str):
        escaped = tree.replace(",", ",,")
        return [f"{path}={escaped}"]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [pair for key, inner in items for pair in flatten(inner, f"{path}.{key}" if path else str(key))]


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4))
def test_any_tree_comes_back(tree: dict[str, Any]) -> None:
    assert value(",".join(flatten(tree))) == tree


@given(st.text(max_size=60))
def test_any_text_gives_a_tree_or_an_option_error(text: str) -> None:
    try:
        parse_argument(text, "driver")
    except OptionError as error:
        assert str(error)
