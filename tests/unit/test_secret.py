# SPDX-License-Identifier: Apache-2.0
"""Secret objects: where their value comes from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from target.graph.errors import BlockError
from target.objects import secret
from tests.support.objects import made, unstarted


def test_value_is_given_or_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(b"line\n")
    assert secret({"pw": made("secret", data="swordfish")}, "pw") == b"swordfish"
    assert secret({"pw": made("secret", file=str(path))}, "pw") == b"line\n"
    assert secret({"pw": made("secret", data="AAEC", format="base64")}, "pw") == b"\x00\x01\x02"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Must provide 'file' or 'data' to load secret"),
        ({"data": "a", "file": "b"}, "'file' and 'data' are mutually exclusive"),
        ({"data": "*", "format": "base64"}, "not valid base64"),
        ({"file": "/nowhere/at/all"}, "Unable to read /nowhere/at/all"),
    ],
)
def test_what_is_wrong_names_the_secret(options: dict[str, str], message: str) -> None:
    with pytest.raises(BlockError, match=f"^secret 'pw': .*{message}"):
        made("secret", **options)


def test_an_id_that_is_no_secret() -> None:
    with pytest.raises(BlockError, match="No secret with id 'pw'"):
        secret({}, "pw")
    other = unstarted("iothread")
    with pytest.raises(BlockError, match="Object with id 'pw' is not a secret"):
        secret({"pw": other}, "pw")
