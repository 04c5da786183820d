# SPDX-License-Identifier: Apache-2.0
"""The handle on a map: a table of entries that a driver fills and the datapath walks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np

from target.datapath._datapath import ffi, lib
from target.datapath.constants import Entries, Grant, check
from target.datapath.objects import Object


class Map(Object):
    """A table of entries over a child; see datapath.h for their bits."""

    slice_bits: int

    @property
    def slices(self) -> int:
        return int(lib.bt_map_slices(self.ptr))

    def reserve(self, size: int) -> None:
        """Makes room for slices up to this size, which ``size`` may be set to then. OSError."""
        check(lib.bt_map_reserve(self.ptr, size))

    @property
    def slice_entries(self) -> int:
        return 1 << self.slice_bits

    @property
    def bytes(self) -> int:
        """Memory of the loaded slices."""
        return int(lib.bt_map_bytes(self.ptr))

    def load(self, slice: int, entries: Entries, writable: bool) -> bool:
        """Installs a slice; False when it is there already."""
        if len(entries) != self.slice_entries:
            raise ValueError(f"a slice has {self.slice_entries} entries, not {len(entries)}")
        result = lib.bt_map_load(self.ptr, slice, ffi.from_buffer("uint64_t[]", entries), writable)
        if result == -errno.EEXIST:
            return False
        check(result)
        return True

    def set_writable(self, slice: int, writable: bool) -> None:
        self._found(lib.bt_map_set_writable(self.ptr, slice, writable), slice)

    def set_zero_entries(self, supported: bool) -> None:
        lib.bt_map_set_zero_entries(self.ptr, supported)

    def get(self, granule: int, count: int = 1) -> Entries | None:
        """Entries from granule on, claims looked through; None when one is not loaded."""
        out = np.empty(count, np.uint64)
        if lib.bt_map_get(self.ptr, granule, count, ffi.from_buffer("uint64_t[]", out)) < 0:
            return None
        return out

    def set(self, granule: int, expected: int, entry: int, dirty: bool = True) -> bool:
        """Replaces an entry if it equals expected; BlockingIOError when claimed, KeyError when not loaded."""
        result = self._found(lib.bt_map_set(self.ptr, granule, expected, entry, dirty), granule)
        return result == 0

    def fill(self, granule: int, count: int, entry: int, dirty: bool = True) -> int:
        """Sets entries outside of the map's size; returns how many, before one in a slice not loaded."""
        return check(lib.bt_map_fill(self.ptr, granule, count, entry, dirty))

    def loaded(self) -> list[int]:
        """The slices that are there."""
        return self._slices(lib.bt_map_loaded)

    def dirty(self) -> list[int]:
        """The dirty slices."""
        return self._slices(lib.bt_map_dirty)

    def _slices(self, list_them: Callable[[Any, Any, int], int]) -> list[int]:
        out = np.empty(max(1, self.bytes // (8 * self.slice_entries) + 64), np.uint64)
        count = list_them(self.ptr, ffi.from_buffer("uint64_t[]", out), len(out))
        return [int(index) for index in out[:count]]

    def clean(self, slice: int) -> Entries:
        """Step 1 of a flush: the slice is clean from here on; returns its entries."""
        out = np.empty(self.slice_entries, np.uint64)
        self._found(lib.bt_map_clean(self.ptr, slice, ffi.from_buffer("uint64_t[]", out)), slice)
        return out

    def redirty(self, slice: int) -> None:
        self._found(lib.bt_map_redirty(self.ptr, slice), slice)

    def hold_flush(self, hold: bool) -> None:
        """While held every flush faults."""
        lib.bt_map_hold_flush(self.ptr, hold)

    def shrink(self, bytes: int) -> int:
        """Drops clean slices down to this budget; returns what is still used."""
        return int(lib.bt_map_shrink(self.ptr, bytes))

    def grant(self, host_offset: int, count: int, zeroed: bool) -> None:
        """Gives the datapath count granules of the child to place."""
        check(lib.bt_map_grant(self.ptr, host_offset, count, zeroed))

    def revoke(self) -> list[Grant]:
        """Takes all unused grants back."""
        grants: list[Grant] = []
        raw = ffi.new("struct bt_grant[]", 64)
        while count := lib.bt_map_revoke(self.ptr, raw, 64):
            grants += [Grant(raw[i].host_offset, raw[i].count, bool(raw[i].zeroed)) for i in range(count)]
        return grants

    @property
    def granted(self) -> int:
        """Granules left in the grant pool."""
        return int(lib.bt_map_granted(self.ptr))

    @property
    def claims(self) -> int:
        """Claims under way; see bt_map_claims."""
        return int(lib.bt_map_claims(self.ptr))

    def set_low_water(self, granules: int) -> None:
        lib.bt_map_set_low_water(self.ptr, granules)

    @staticmethod
    def _found(result: int, what: int) -> int:
        if result == -errno.ENOENT:
            raise KeyError(what)
        if result == -errno.ESTALE:
            return result
        if result == -errno.EBUSY:
            raise BlockingIOError(errno.EBUSY, f"{what} is claimed")
        return check(result)
