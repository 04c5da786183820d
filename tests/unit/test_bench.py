# SPDX-License-Identifier: Apache-2.0
"""The benchmark's figures, tables and picture, from samples that are made up."""

from __future__ import annotations

import itertools
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import clients, plot, summary, table
from tests.bench.docs import BEGIN, END, replace_generated, write_docs
from tests.bench.machine import Usage, process_cpu
from tests.bench.memory import Memory
from tests.bench.rows import LIMIT_CALLS, LIMIT_RING, MEMORY_ROWS, NBDKIT, QSD, ROWS, TARGET, Bar, Row, chosen
from tests.bench.run import rotated
from tests.bench.summary import Results

SAMPLE = clients.Sample(
    iops=1000,
    mibps=3.9,
    mean=12,
    p50=10,
    p99=90,
    cpu=4.0,
    client_cpu=2.0,
    ios=100,
    seconds=0.1,
    others=0.0,
    stolen=0.0,
)
MACHINE = {
    "cpu": "a CPU",
    "cpus": 2,
    "memory_gib": 4.0,
    "kernel": "6.1",
    "filesystem": "ext4",
    "load_average_at_start": [0.5, 0.25, 0.125],
    "date": "2026-01-01 00:00 UTC",
    "versions": {"qemu": "qemu 7.2"},
}
SETTINGS = {"repetitions": 3, "seconds": 2.0, "size": 512 << 20}


def row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


RAW, QCOW2 = row("vhost-raw-randread-4k-qd32"), row("vhost-qcow2-randread-4k-qd32")
NBD = row("nbd-raw-randread-4k-qd32")


def results(**iops: dict[str, list[float]]) -> Results:
    """Results with these IOPS; underscores in the rows' names stand for dashes."""
    made = Results(MACHINE, SETTINGS)
    for name, cells in iops.items():
        for backend, values in cells.items():
            for value in values:
                made.add(name.replace("_", "-"), backend, replace(SAMPLE, iops=value, cpu=4000 / value))
    return made


@pytest.fixture
def some() -> Results:
    made = results(
        vhost_raw_randread_4k_qd32={
            TARGET: [290, 300, 9000],
            QSD: [100, 90, 110],
            LIMIT_RING: [400],
            LIMIT_CALLS: [600],
        },
        vhost_qcow2_randread_4k_qd32={TARGET: [240], QSD: [300]},
        nbd_raw_randread_4k_qd32={TARGET: [160], NBDKIT: [100], QSD: [50]},
    )
    made.memory["memory-nbd-empty-1TiB"] = {TARGET: Memory(20, 200, 60), QSD: Memory(1, 2, 2)}
    made.images["raw"] = {"resident": 1.0, "in_large_folios": None, "pins": 1}
    return made


def test_row_names_are_unique_and_rows_ask_for_something() -> None:
    names = [row.name for row in ROWS] + [row.name for row in MEMORY_ROWS]
    assert len(set(names)) == len(names)
    for one in ROWS:
        assert {bar.measure for bar in one.bars} == {"iops", "cpu"}
        for bar in one.bars:
            assert bar.against in one.backends() or bar.against in names


def test_patterns_choose_rows() -> None:
    assert [r.name for r in ROWS if chosen(r.name, ["direct*write"])] == ["vhost-direct-randwrite-4k-qd32"]
    assert chosen("memory-nbd-empty-1TiB", ["null", "nbd-*"]) and chosen("anything", [])
    assert not chosen("nbd-raw-randread-4k-qd32", ["vhost"])


def test_each_repetition_begins_with_another_backend() -> None:
    assert rotated("abc", 0) == ["a", "b", "c"]
    assert rotated("abc", 4) == ["b", "c", "a"]


def test_figures_are_medians(some: Results) -> None:
    assert some.value(RAW.name, TARGET, "iops") == 300
    assert some.ratio(RAW.name, QSD) == 3
    assert some.limit(RAW.name) == 600
    assert some.of_limit(RAW.name, TARGET) == 0.5
    assert some.ratio(RAW.name, NBDKIT) is None and some.value("no-such-row", TARGET, "iops") is None


@pytest.mark.parametrize(
    ("measured", "bar", "word"),
    [
        (1.5, Bar("iops", QSD, 1.5), "PASS"),
        (1.496, Bar("iops", QSD, 1.5), "PASS"),
        (1.494, Bar("iops", QSD, 1.5), "short"),
        (0.6, Bar("cpu", QSD, 0.6), "PASS"),
        (0.61, Bar("cpu", QSD, 0.6), "short"),
        (None, Bar("cpu", QSD, 0.6), "not measured"),
    ],
)
def test_verdicts(measured: float | None, bar: Bar, word: str) -> None:
    assert summary.Verdict(bar, measured).word == word


def test_bars_compare_with_peers_and_with_our_own_rows(some: Results) -> None:
    against_peer, against_own, cpu = (some.verdict(QCOW2, bar) for bar in sorted(QCOW2.bars, key=_order))
    assert against_peer.measured == pytest.approx(0.8) and against_peer.word == "short"
    assert against_own.measured == pytest.approx(0.8) and against_own.bar.times == 0.9
    assert cpu.measured == pytest.approx(300 / 240)


def _order(bar: Bar) -> int:
    return 2 if bar.measure == "cpu" else int(bar.against == RAW.name)


def test_disturbed_cells_are_counted(some: Results) -> None:
    some.add(RAW.name, QSD, replace(SAMPLE, others=0.9))
    assert some.disturbed() == (1, 14)


def test_json_round_trip_keeps_every_sample(some: Results) -> None:
    document = summary.to_json(some, ROWS, MEMORY_ROWS)
    again = summary.from_json(document)
    assert again.cells == some.cells and again.memory == some.memory
    assert summary.to_json(again, ROWS, MEMORY_ROWS) == document
    found = {row["name"]: row for row in document["rows"]}
    assert found[RAW.name]["backends"][QSD]["median"]["ours"] == 3
    assert document["memory"][0]["verdict"] == "short"
    with pytest.raises(ValueError, match="format 7"):
        summary.from_json({"format": 7})


def test_tables_are_rectangular() -> None:
    text = table.table(("a", "long head"), [("x", "1"), ("yyy", "2")])
    assert text.splitlines() == [
        "| a   | long head |",
        "| --- | --------- |",
        "| x   | 1         |",
        "| yyy | 2         |",
    ]


def test_markdown_has_figures_ratios_and_verdicts(some: Results) -> None:
    some.failures.append("row, server: why")
    text = table.markdown(some)
    lines = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines()}
    assert (RAW.name, "at least 1.5x the IOPS of qemu-storage-daemon", "3.00x", "PASS") in lines
    assert (QCOW2.name, f"at least 0.9x the IOPS of ours on {RAW.name}", "0.80x", "short") in lines
    figures = next(line for line in lines if line[:2] == (RAW.name, QSD))
    assert figures[2] == "100 (90..110)" and figures[7:9] == ("17%", "3.00x")
    assert (MEMORY_ROWS[0].name, TARGET, "20.0", "200.0", "60.0", "150", "short") in lines
    assert "- row, server: why" in text and "Load average at the start 0.50" in text
    assert "folio size unknown" in text


def test_plot_is_svg_with_a_mark_for_each_server(some: Results) -> None:
    root = ET.fromstring(plot.svg(some))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert RAW.name in texts and "3.00x" in texts and "1.60x" in texts
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 3 + 2 + 2 + 3  # the legend, then the servers of three rows


def test_plot_of_nothing_is_svg() -> None:
    assert ET.fromstring(plot.svg(Results(MACHINE, SETTINGS))).tag.endswith("svg")


def test_axis_is_logarithmic_and_clamps() -> None:
    axis = plot.Axis([0.3, 4.0])
    assert (axis.low, axis.high) == (0.2, 5)
    assert axis.x(0.001) == axis.x(0.2) and axis.x(1000) == axis.x(5)
    assert axis.x(1) - axis.x(0.5) == pytest.approx(axis.x(2) - axis.x(1))


def test_generated_part_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(tmp_path, "new\n", "<svg/>")
    text = page.read_text()
    assert (
        text.startswith(f"before\n{BEGIN}\n")
        and text.endswith(f"new\n\n{END}\nafter\n")
        and "old" not in text
    )
    assert (tmp_path / "performance.svg").read_text() == "<svg/>"
    for bad in ("", BEGIN, END + BEGIN, BEGIN + BEGIN + END):
        with pytest.raises(ValueError):
            replace_generated(bad, "new")


def test_the_page_has_its_marks() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
    assert "new" in replace_generated(page.read_text(), "new")


def test_fio_figures() -> None:
    side = {
        "iops": 2560.0,
        "total_ios": 256,
        "runtime": 100,
        "lat_ns": {"mean": 5000, "percentile": {"50.000000": 4000, "99.000000": 9000}},
    }
    usage = Usage(None, others=0.5, client=0.00256)
    sample = clients.fio_sample({"read": side}, RAW.work, usage)
    assert (sample.iops, sample.mibps, sample.p50, sample.p99) == (2560, 10, 4, 9)
    assert sample.cpu == pytest.approx(10) and sample.others == 0.5
    first_touch = row("vhost-qcow2-first-touch-4k-qd32").work
    assert clients.fio_sample({"write": side}, first_touch, usage).cpu is None


def test_fio_commands() -> None:
    work = row("vhost-qcow2-first-touch-4k-qd32").work
    argv = clients.fio_command(LIMIT_RING, Path("f"), 1 << 30, work, 2, False)
    assert {"--number_ios=8000", "--blockalign=65536", "--rw=randwrite", "--iodepth=32"} <= set(argv)
    argv = clients.fio_command(LIMIT_CALLS, Path("f"), 1 << 30, RAW.work, 0.25, False)
    assert {"--runtime=250ms", "--ioengine=psync", "--iodepth=1", "--invalidate=0"} <= set(argv)


def test_cpu_time_of_a_process_counts() -> None:
    before = process_cpu(os.getpid())
    assert sum(itertools.repeat(1, 1_000_000)) and process_cpu(os.getpid()) > before
