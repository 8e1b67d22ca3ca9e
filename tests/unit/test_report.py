"""The bench's table, JSON and page."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bench import plots, report
from bench.measure import Machine, Ratio, Report, Result

MACHINE = Machine("Processor & Co <9000>", "Linux 6.18", "3.11.2", 2, read_bandwidth=20e9, sgemm=1e11, date="2026-11-23")
VOID = {"meta", "link", "br", "img", "hr", "input"}


def made() -> Report:
    """Two engines at two numbers of streams and one open loop; figures of one's own choosing."""
    times = [i / 1000 for i in range(1, 101)]
    results = [
        Result(
            what,
            streams,
            first_tokens=[0.2, 0.1, 0.3],
            inter_tokens=times,
            rates=[90.0, 110.0, 100.0],
            prompt_tokens=128,
            tokens=64,
            arrivals=arrivals,
            start_seconds=1.25,
            rss=256_000_000,
            weights=510_000_000,
            parameters=100_000_000,
            perplexity=21.31,
            reference_perplexity=21.30,
            note="a setting <of its own>",
            errors=3 if arrivals else 0,
        )
        for streams, arrivals in ((1, None), (8, None), (0, 2.5))
        for what in ("ours int4", "theirs Q4_1")
    ]
    ratios = [
        Ratio("ours int4", "theirs Q4_1", 1, "ITL p50", [0.8, 0.9, 1.1]),
        Ratio("ours int4", "theirs Q4_1", 8, "tokens/s", []),
    ]
    return Report(MACHINE, results, ratios, command="engineshed bench --page 'x y.html'")


def printed(whole: Report) -> str:
    console = Console(width=220, file=io.StringIO(), record=True)
    report.show(whole, console)
    return console.export_text()


class Reader(HTMLParser):
    """Reads a page strictly: every element closed in order, nothing loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}, f"{tag} loads something"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed out of order"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_figures_are_percentiles_in_milliseconds_and_shares_of_the_limits() -> None:
    titles, rows = report.figures(made())
    first = dict(zip(titles, rows[0], strict=True))
    assert first == {
        "what": "ours int4",
        "load": "1",
        "TTFT p50 ms": "200.0",
        "TTFT p99": "300.0",
        "ITL p50 ms": "51.0",
        "ITL p90": "91.0",
        "ITL p99": "100.0",
        "tok/s": "100.0",
        "of bandwidth": "50%",
        "of sgemm": "128%",
        "start s": "1.25",
        "RSS MB": "256",
        "perplexity": "21.31",
        "failed": "",
    }
    assert rows[-1][titles.index("load")] == "2.5/s"
    assert rows[-1][titles.index("failed")] == "3"


def test_columns_without_any_figure_are_left_out() -> None:
    titles, _ = report.figures(Report(MACHINE, [Result("x", 1, [0.1], [0.01], [5.0])]))
    assert titles == ["what", "load", "TTFT p50 ms", "TTFT p99", "ITL p50 ms", "ITL p90", "ITL p99", "tok/s"]


def test_the_table_shows_every_result_every_ratio_and_every_note_once() -> None:
    shown = printed(made())
    assert shown.count("ours int4 ") >= 3
    assert "memory reads 20.0 GB/s, sgemm 100 Gflop/s" in shown
    assert re.search(r"ITL p50 +0\.90 +0\.80 +1\.10", shown)
    assert "theirs Q4_1, 1 stream, 8 streams, 2.5/s arriving: a setting <of its own>" in shown


def test_json_gives_the_report_back_and_its_figures_in_words(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.write_json(made(), path)
    assert report.read_json(path) == made()
    assert '"ITL p99": "100.0"' in path.read_text()


def test_the_page_is_one_sound_file_that_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report.write_page(made(), path)
    page = path.read_text(encoding="utf-8")
    reader = read(page)
    assert "script" not in reader.seen
    assert "@import" not in page
    assert "url(" not in page
    assert "prefers-color-scheme" in page
    assert 'name="viewport"' in page


def test_the_page_has_every_result_in_its_table_and_in_its_plots() -> None:
    whole = made()
    page = report.page(whole)
    text = read(page).text
    titles, rows = report.figures(whole)
    for row in rows:
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" in page
    for words in (
        "Processor & Co <9000>",
        "20.0 GB/s",
        "100 Gflop/s",
        "2026-11-23",
        "a setting <of its own>",
        whole.command,
        *titles,
    ):
        assert words in text
    drawn = [plot for plot in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "theirs Q4_1" in plot]
    # Two kinds of time at three loads, three lines by streams and three by arrivals, ratios, and three of what stands.
    assert len(drawn) == 2 * 3 + 3 + 3 + 1 + 3


def test_every_plot_is_well_formed_and_within_its_frame() -> None:
    for source in re.findall(r"<svg.*?</svg>", report.page(made()), re.DOTALL):
        plot = ElementTree.fromstring(source)
        width, height = (float(size) for size in plot.attrib["viewBox"].split()[2:])
        for element in plot.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert 0 <= float(element.get(name, 0)) <= width, ElementTree.tostring(element)
            for name in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.get(name, 0)) <= height, ElementTree.tostring(element)
            assert float(element.get("width", 0)) >= 0


def test_a_page_of_a_single_bare_result_has_bars_instead_of_lines() -> None:
    page = report.page(Report(MACHINE, [Result("x", 1, [0.1], [0.01], [5.0])]))
    read(page)
    assert "polyline" not in page
    assert page.count("<svg") == 3


def test_an_engine_that_gave_one_token_has_no_time_between_tokens() -> None:
    page = report.page(Report(MACHINE, [Result("x", 1, [0.1], [], [5.0]), Result("x", 8, [0.1], [0.02], [9.0])]))
    assert "Time between tokens" in page
    read(page)


def bar(value: float, middle: float | None = None, high: float | None = None) -> plots.Bar:
    return plots.Bar("x", plots.Ink(0), value, "label", middle=middle, high=high)


def test_bars_begin_at_zero_and_are_as_long_as_their_values() -> None:
    plot = ElementTree.fromstring(plots.bars([bar(10), bar(20), bar(5)], "ms"))
    lengths = [float(rect.get("width", "")) for rect in plot.iter("{http://www.w3.org/2000/svg}rect")]
    assert lengths[1] / lengths[0] == pytest.approx(2, rel=0.01)
    assert lengths[2] / lengths[0] == pytest.approx(0.5, rel=0.01)


def test_a_whisker_far_beyond_the_bars_does_not_shrink_them() -> None:
    plot = ElementTree.fromstring(plots.bars([bar(10, middle=12, high=5000)], "ms"))
    (rect,) = plot.iter("{http://www.w3.org/2000/svg}rect")
    assert float(rect.get("width", "")) > plots.WIDTH / 3


@pytest.mark.parametrize("reach", [0.0, 1e-9, 0.3, 1, 4.99, 5, 17, 99, 100, 12345.6])
def test_ticks_of_bars_start_at_zero_are_few_and_hold_all(reach: float) -> None:
    ticks = plots.zero_based_ticks(reach)
    assert ticks[0] == 0
    assert ticks[-1] >= reach
    assert 2 <= len(ticks) <= 6
    if reach:
        assert ticks[-2] < reach, "an axis has no empty end"


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.6, 1.4), (0.3, 1.05), (0.001, 1.2), (0.9, 300), (0.99, 1.01)])
def test_ticks_of_ratios_are_few_and_hold_one(low: float, high: float) -> None:
    ticks = plots.ratio_ticks(low, high)
    assert 1 in ticks
    assert len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)


def test_a_family_keeps_its_hue_and_its_members_differ() -> None:
    names = ["ours int4", "theirs a", "ours fp32", "theirs a", "third", *(f"more{i}" for i in range(9))]
    inks = plots.inks(names)
    assert inks["ours int4"].hue == inks["ours fp32"].hue
    assert inks["ours int4"] != inks["ours fp32"]
    assert len({inks[name].hue for name in ("ours int4", "theirs a", "third")}) == 3
    assert all(ink.hue <= plots.COLOURS for ink in inks.values())


def test_a_dot_has_the_colour_of_the_side_that_it_favours() -> None:
    whole = made()
    whole.ratios = [
        Ratio("ours int4", "theirs Q4_1", 1, "ITL p50", [0.8, 1.2, 1.3]),
        Ratio("ours int4", "theirs Q4_1", 1, "tokens/s", [1.4]),
    ]
    (plot,) = (plot for plot in re.findall(r"<svg.*?</svg>", report.page(whole), re.DOTALL) if "× the time" in plot)
    hues = re.findall(r'<circle class="f(\d)"', plot)
    ours, theirs = "0", "1"
    assert hues == [ours, theirs, theirs, ours]
