# SPDX-License-Identifier: Apache-2.0
"""The virtio block device: configuration space, features, cache mode (virtio 1.2, section 5.2)."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from target.exports.vhost_user_blk.device import CONFIG, BlockDevice, Feature

ALL = Feature.FLUSH | Feature.CONFIG_WCE | Feature.VERSION_1


def device(**changes: Any) -> BlockDevice:
    values: dict[str, Any] = {
        "capacity": 1 << 20, "block_size": 512, "queues": 3, "writable": True, "writethrough": False,
        "seg_max": 126, "max_segments": 32, "max_sectors": 1 << 21,
    }  # fmt: skip
    return BlockDevice(**(values | changes))


def test_layout() -> None:
    """Offsets are those of struct virtio_blk_config in linux/virtio_blk.h."""
    config = device().config()
    assert len(config) == CONFIG.size == 60
    for offset, form, value in [
        (0, "Q", 2048), (12, "I", 126), (20, "I", 512), (24, "B", 3), (26, "H", 8), (32, "B", 1),
        (34, "H", 3), (36, "I", 1 << 21), (40, "I", 32), (44, "I", 1), (48, "I", 1 << 21),
        (52, "I", 32), (56, "B", 1),
    ]:  # fmt: skip
        assert struct.unpack_from("<" + form, config, offset) == (value,), offset


def test_large_blocks() -> None:
    config = device(block_size=4096).config()
    assert struct.unpack_from("<I", config, 20) == (4096,)
    assert config[24] == 0  # a physical block is a logical one
    assert struct.unpack_from("<I", config, 44) == (8,)  # discards in whole blocks


def test_features() -> None:
    assert Feature.CONFIG_WCE in device().offered
    assert Feature.RO not in device().offered
    assert Feature.FLUSH in device(writethrough=True).offered
    assert Feature.CONFIG_WCE not in device(writethrough=True).offered
    read_only = device(writable=False)
    assert Feature.RO in read_only.offered
    assert not read_only.offered & (Feature.DISCARD | Feature.WRITE_ZEROES | Feature.CONFIG_WCE)
    assert not any(read_only.config()[36:57])


@pytest.mark.parametrize("bit", [0, 7, 15, 26, 27, 33, 34, 63])
def test_bits_that_were_not_offered(bit: int) -> None:
    with pytest.raises(ValueError, match="not offered"):
        device().take(1 << 32 | 1 << bit)


def test_reads_of_the_configuration() -> None:
    d = device()
    assert d.read_config(0, 8, 256) == struct.pack("<Q", 2048)
    assert d.read_config(56, 8, 256) == b"\x01" + bytes(7)
    assert d.read_config(60, 196, 256) == bytes(196)
    for offset, size in [(0, 0), (0, 257), (256, 1), (250, 7), (0xFFFFFFFF, 1)]:
        assert d.read_config(offset, size, 256) is None


@pytest.mark.parametrize(
    ("taken", "writeback"),
    [
        (Feature.VERSION_1, False),
        (Feature.FLUSH, True),
        (Feature.FLUSH | Feature.CONFIG_WCE, True),
        (Feature.CONFIG_WCE, False),
    ],
)
def test_cache_mode_after_negotiation(taken: Feature, writeback: bool) -> None:
    d = device()
    d.take(taken)
    assert d.writeback is writeback
    assert bool(d.config()[32]) is writeback


def test_choice_of_the_cache_mode() -> None:
    d = device()
    modes = []
    d.take(ALL)
    assert d.write_config(32, b"\0")
    modes.append(d.writeback)
    assert d.config()[32] == 0
    d.take(Feature.FLUSH)  # another driver, which does not know of the choice
    modes.append(d.writeback)
    d.reset()
    d.take(ALL)
    modes.append(d.writeback)
    assert modes == [False, True, True]


@pytest.mark.parametrize(
    ("offset", "data"), [(0, bytes(8)), (33, b"\1"), (32, b"\2"), (32, b"\1\1"), (32, b"")]
)
def test_writes_that_are_refused(offset: int, data: bytes) -> None:
    d = device()
    d.take(ALL)
    assert not d.write_config(offset, data)
    assert d.writeback


def test_write_through_is_the_exports_choice() -> None:
    d = device(writethrough=True)
    d.take(Feature.FLUSH)
    assert not d.writeback
    assert not d.write_config(32, b"\1")
    assert d.config()[32] == 0
