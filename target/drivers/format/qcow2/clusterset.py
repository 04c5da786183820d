# SPDX-License-Identifier: Apache-2.0
"""A set of host clusters by number, for overlap checks: which clusters hold metadata.

Pages of booleans exist only where there are members, so that a sparse file of any length costs little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PAGE_BITS = 15
_PAGE = 1 << _PAGE_BITS


class ClusterSet:
    """Members are cluster numbers from 0 to 2**63."""

    def __init__(self) -> None:
        self._pages: dict[int, NDArray[np.bool_]] = {}

    def add(self, first: int, count: int = 1) -> None:
        end = first + count
        while first < end:
            number, at = first >> _PAGE_BITS, first & (_PAGE - 1)
            n = min(_PAGE - at, end - first)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = np.zeros(_PAGE, dtype=np.bool_)
            page[at : at + n] = True
            first += n

    def discard(self, clusters: NDArray[np.uint64]) -> None:
        """Removes every element that is a member."""
        for number, at in _by_page(clusters):
            page = self._pages.get(number)
            if page is not None:
                page[clusters[at] & np.uint64(_PAGE - 1)] = False

    def update(self, clusters: NDArray[np.uint64]) -> None:
        """Adds every element."""
        for number, at in _by_page(clusters):
            page = self._pages.setdefault(number, np.zeros(_PAGE, dtype=np.bool_))
            page[clusters[at] & np.uint64(_PAGE - 1)] = True

    def contains(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """For each element, whether it is a member."""
        out = np.zeros(clusters.shape, dtype=np.bool_)
        for number, at in _by_page(clusters):
            page = self._pages.get(number)
            if page is not None:
                out[at] = page[clusters[at] & np.uint64(_PAGE - 1)]
        return out

    def overlaps(self, first: int, count: int) -> bool:
        """Whether any of a run is a member."""
        end = first + count
        while first < end:
            number, at = first >> _PAGE_BITS, first & (_PAGE - 1)
            n = min(_PAGE - at, end - first)
            page = self._pages.get(number)
            if page is not None and bool(page[at : at + n].any()):
                return True
            first += n
        return False


class Metadata:
    """The clusters of an image that hold metadata, as far as they are known from memory."""

    def __init__(self) -> None:
        self.fixed = ClusterSet()  # header, L1 tables, refcount table and blocks, snapshot table
        self.l2_tables = ClusterSet()  # of the active L1 table

    def contains(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self.fixed.contains(clusters) | self.l2_tables.contains(clusters)

    def overlaps(self, first: int, count: int) -> bool:
        return self.fixed.overlaps(first, count) or self.l2_tables.overlaps(first, count)

    def forget(self, clusters: NDArray[np.uint64]) -> None:
        """These clusters are free now."""
        self.fixed.discard(clusters)
        self.l2_tables.discard(clusters)


def _by_page(clusters: NDArray[np.uint64]) -> list[tuple[int, NDArray[np.intp]]]:
    """The page numbers that occur, each with the indices of its elements."""
    if not clusters.size:
        return []
    pages = clusters >> np.uint64(_PAGE_BITS)
    if bool((pages == pages[0]).all()):
        return [(int(pages[0]), np.arange(clusters.size))]
    order = np.argsort(pages, kind="stable")
    numbers, starts = np.unique(pages[order], return_index=True)
    groups = np.split(order, starts[1:])
    return [(int(number), group) for number, group in zip(numbers, groups, strict=True)]
