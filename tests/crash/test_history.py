# SPDX-License-Identifier: Apache-2.0
"""The model that judges crashes must itself notice what is lost, stale, torn, or from nowhere."""

from __future__ import annotations

import pytest

from tests.crash.history import SECTOR, Change, History, Kind, numbered

BASE = numbered(1, 6) + bytes(2 * SECTOR)


@pytest.fixture
def history() -> History:
    return History(BASE)


def write(history: History, first: int, count: int, fua: bool = False) -> Change:
    change = history.begin(Kind.WRITE, first, count)
    history.complete(change, fua)
    return change


def flush(history: History) -> None:
    history.complete_flush(history.begin_flush())


def disk(*changes: Change, base: bytes = BASE) -> bytes:
    data = bytearray(base)
    for change in changes:
        new = bytes(change.length) if change.kind is not Kind.WRITE else change.data()
        data[change.offset : change.offset + change.length] = new
    return bytes(data)


def wrong(history: History, data: bytes) -> None:
    with pytest.raises(AssertionError):
        history.check_content(data)


def test_without_a_flush_all_may_be_there_or_not(history: History) -> None:
    a, b = write(history, 0, 4), write(history, 2, 4)
    for found in (BASE, disk(a), disk(b), disk(a, b), disk(b, a)):
        history.check_content(found)


def test_a_flushed_write_must_be_there(history: History) -> None:
    a = write(history, 0, 4)
    flush(history)
    history.check_content(disk(a))
    wrong(history, BASE)
    wrong(history, disk(a)[: 3 * SECTOR] + BASE[3 * SECTOR :])


def test_fua_is_a_flush_of_the_write_alone(history: History) -> None:
    a, b = write(history, 0, 2), write(history, 4, 2, fua=True)
    history.check_content(disk(b))
    wrong(history, disk(a))


def test_what_came_after_the_flush_may_be_there(history: History) -> None:
    a = write(history, 0, 4)
    flush(history)
    b, unanswered = write(history, 0, 2), history.begin(Kind.WRITE, 1, 2)
    for found in (disk(a), disk(a, b), disk(a, unanswered), disk(a, b, unanswered), disk(a, unanswered, b)):
        history.check_content(found)
    wrong(history, disk(b))


def test_what_was_overwritten_before_the_flush_may_not(history: History) -> None:
    a, b = write(history, 0, 4), write(history, 0, 4)
    flush(history)
    history.check_content(disk(b))
    wrong(history, disk(a))


def test_writes_at_the_same_time_take_any_order(history: History) -> None:
    a, b = history.begin(Kind.WRITE, 0, 4), history.begin(Kind.WRITE, 0, 4)
    history.complete(a)
    history.complete(b)
    flush(history)
    history.check_content(disk(a))
    history.check_content(disk(b))
    wrong(history, BASE)


def test_a_write_during_the_flush_is_not_covered(history: History) -> None:
    begun = history.begin_flush()
    a = write(history, 0, 1)
    history.complete_flush(begun)
    history.check_content(BASE)
    history.check_content(disk(a))


def test_zeroes_and_discards(history: History) -> None:
    zeroes = history.begin(Kind.ZEROES, 0, 1)
    history.complete(zeroes)
    discard = history.begin(Kind.DISCARD, 1, 1)
    history.complete(discard)
    flush(history)
    history.check_content(disk(zeroes))
    history.check_content(disk(zeroes, discard))
    wrong(history, disk(discard))
    a = write(history, 0, 2)
    flush(history)
    wrong(history, disk(zeroes, discard))
    history.check_content(disk(a))


def test_a_failed_write_may_show_later(history: History) -> None:
    failed = history.begin(Kind.WRITE, 0, 2)
    a = write(history, 0, 2)
    flush(history)
    history.check_content(disk(a))
    history.check_content(disk(failed))
    wrong(history, BASE)


def test_torn_sectors_and_strangers(history: History) -> None:
    a = write(history, 0, 2)
    torn = bytearray(disk(a))
    torn[600:608] = bytes(8)
    wrong(history, bytes(torn))
    wrong(history, numbered(500, 1) + BASE[SECTOR:])  # a number that nobody wrote
    wrong(history, BASE[SECTOR : 2 * SECTOR] * 2 + BASE[2 * SECTOR :])  # another sector's content
    wrong(history, BASE[: 7 * SECTOR] + a.data()[:SECTOR])  # a write in a place that it was not for


def test_reads_see_every_answered_write(history: History) -> None:
    a = write(history, 0, 2)
    begun = history.begin_read(0, 2)
    b = history.begin(Kind.WRITE, 0, 1)
    history.check_read(0, disk(a)[: 2 * SECTOR], begun)
    history.check_read(0, disk(a, b)[: 2 * SECTOR], begun)
    with pytest.raises(AssertionError, match="sector 0 read: from the beginning"):
        history.check_read(0, BASE[: 2 * SECTOR], begun)


def test_a_read_may_meet_a_write_half_way(history: History) -> None:
    a = write(history, 0, 1)
    begun = history.begin_read(0, 1)
    b = history.begin(Kind.WRITE, 0, 1)
    half = a.data()[:256] + b.data()[256:]
    history.check_read(0, half, begun)
    with pytest.raises(AssertionError, match="sector 0 read: from the beginning"):
        history.check_read(0, BASE[:256] + b.data()[256:], begun)
    with pytest.raises(AssertionError, match="in part"):
        history.check_read(0, a.data()[:256] + BASE[:256], begun)
