"""What a run of the bench found: as a table, as JSON, and as a page with plots that needs nothing but a browser."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bench import plots
from bench.measure import Machine, Ratio, Report, Result, percentile
from bench.plots import Bar, Ink, Line, Spread

RATE = "tokens/s"
"""The figure of which more is better; of all others less is."""


class Column(NamedTuple):
    """A figure of a result in words; empty where it has none."""

    title: str
    cell: Callable[[Result, Machine], str]


COLUMNS = (
    Column("what", lambda result, _: result.what),
    Column("load", lambda result, _: load(result.streams, result.arrivals)),
    Column("TTFT p50 ms", lambda result, _: _ms(result.first_token_at(0.5))),
    Column("TTFT p99", lambda result, _: _ms(result.first_token_at(0.99))),
    Column("ITL p50 ms", lambda result, _: _ms(result.inter_token(0.5))),
    Column("ITL p90", lambda result, _: _ms(result.inter_token(0.9))),
    Column("ITL p99", lambda result, _: _ms(result.inter_token(0.99))),
    Column("latency p50 ms", lambda result, _: _ms(percentile(result.latencies, 0.5))),
    Column("tok/s", lambda result, _: _number(result.tokens_per_second, 1)),
    Column("of bandwidth", lambda result, machine: _share(result.bandwidth_share(machine))),
    Column("of sgemm", lambda result, machine: _share(result.sgemm_share(machine))),
    Column("reused", lambda result, _: _share(result.cached_share or None)),
    Column("start s", lambda result, _: _number(result.start_seconds, 2)),
    Column("RSS MB", lambda result, _: _number(None if result.rss is None else result.rss / 1e6, 0)),
    Column("perplexity", lambda result, _: _number(result.perplexity, 2)),
    Column("failed", lambda result, _: str(result.errors or "")),
)


def load(streams: int, arrivals: float | None) -> str:
    """How a result's requests came, short: streams of a closed loop, or arrivals a second of an open one."""
    return str(streams) if arrivals is None else f"{arrivals:g}/s"


def _load_in_words(streams: int, arrivals: float | None) -> str:
    if arrivals is not None:
        return f"{arrivals:g}/s arriving"
    return f"{streams} stream{'s' if streams > 1 else ''}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.{0 if seconds >= 1 else 1 if seconds >= 0.001 else 3}f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def figures(report: Report) -> tuple[list[str], list[list[str]]]:
    """The titles of the columns in which any result has a figure, and the results' rows."""
    used = [column for column in COLUMNS if any(column.cell(result, report.machine) for result in report.results)]
    return [column.title for column in used], [
        [column.cell(result, report.machine) for column in used] for result in report.results
    ]


def table(report: Report) -> Table:
    """The figures: medians and percentiles over all repeats."""
    titles, rows = figures(report)
    shown = Table(title=_machine(report.machine), title_justify="left", title_style="", box=SIMPLE)
    for title in titles:
        shown.add_column(title, justify="left" if title == "what" else "right", no_wrap=title == "what")
    for row in rows:
        shown.add_row(*row)
    return shown


def ratio_table(report: Report) -> Table:
    """The ratios: the median of the repeats, and the least and the greatest."""
    shown = Table(box=SIMPLE)
    for title in ("what", "beside", "load", "figure", "ratio", "least", "greatest"):
        shown.add_column(title, justify="right" if title in ("load", "ratio", "least", "greatest") else "left")
    for ratio in _valued(report):
        spread = (f"{value:.2f}" for value in (ratio.median or 0.0, min(ratio.values), max(ratio.values)))
        shown.add_row(ratio.what, ratio.against, load(ratio.streams, ratio.arrivals), ratio.figure, *spread)
    return shown


def show(report: Report, console: Console) -> None:
    """Print the figures, the ratios, and what was noted."""
    console.print(table(report))
    if _valued(report):
        console.print(ratio_table(report))
    for words in _notes(report):
        console.print(words, style="dim", markup=False)


class Written(Report):
    """A report in a file: with its figures in words, for readers that want no percentiles of their own."""

    figures: list[dict[str, str]] = msgspec.field(default_factory=list)


def write_json(report: Report, path: Path) -> None:
    """Write all that was measured, and the table's figures; `read_json` reads it."""
    titles, rows = figures(report)
    named = [dict(zip(titles, row, strict=True)) for row in rows]
    whole = Written(**msgspec.structs.asdict(report), figures=named)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")


def read_json(path: Path) -> Report:
    """What `write_json` has written; raises OSError or msgspec.DecodeError."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def _valued(report: Report) -> list[Ratio]:
    return [ratio for ratio in report.ratios if ratio.values]


def _notes(report: Report) -> list[str]:
    """What was noted, said once for neighbours with the same note."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in report.results:
        if result.note:
            found.setdefault((result.what, result.note), []).append(_load_in_words(result.streams, result.arrivals))
    return [f"{what}, {', '.join(loads)}: {note}" for (what, note), loads in found.items()]


def _machine(machine: Machine) -> str:
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.system}, Python {machine.python}, {machine.date}\n"
        f"memory reads {machine.read_bandwidth / 1e9:.1f} GB/s, sgemm {machine.sgemm / 1e9:.0f} Gflop/s{_others(machine)}"
    )


def _others(machine: Machine) -> str:
    return "" if machine.others is None else f", {machine.others:.0%} of the cores' time went to other processes"


def give(report: Report, console: Console, json: Path | None, page: Path | None) -> None:
    """Show the report, and write it to the files that are named."""
    show(report, console)
    if json is not None:
        write_json(report, json)
    if page is not None:
        write_page(report, page)


def write_page(report: Report, path: Path) -> None:
    """Write one HTML file with every figure: no scripts, nothing loaded, for light and dark, wide and narrow."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The page's HTML."""
    inks = plots.inks([result.what for result in report.results] + [ratio.against for ratio in report.ratios])
    sections = (
        _section("Time between tokens", _BETWEEN, _between(report, inks)),
        _section("Time to the first token", _FIRST, _first(report, inks)),
        _section("Streams side by side", _STREAMS, _by_streams(report, inks)),
        _section("Requests as they come", _OPEN, _by_arrivals(report, inks)),
        _section("Beside each other", _BESIDE, _beside(report, inks)),
        _section("Start, memory, quality", "", _standing(report, inks)),
        _all_figures(report),
    )
    machine = report.machine
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>engineshed bench, {escape(machine.date)}</title>
<style>{_STYLE}{plots.STYLE}</style>
</head>
<body>
<header>
<h1>engineshed bench</h1>
<p>{escape(machine.date)} · {escape(machine.processor)} · {machine.cores} cores · {escape(machine.system)} · \
Python {escape(machine.python)}</p>
<ul class="limits">
<li><b>{machine.read_bandwidth / 1e9:.1f} GB/s</b> memory read by all cores, the limit of decode for one stream</li>
<li><b>{machine.sgemm / 1e9:.0f} Gflop/s</b> float32 matrix product on all cores, the limit of a float32 prefill\
{escape(_others(machine))}</li>
</ul>
{f"<pre>{escape(report.command)}</pre>" if report.command else ""}
</header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


_BETWEEN = (
    "Bars: median. Whiskers: to p99, with a tick at p90. Strokes across bars: the time that reading the weights once takes at "
    "the measured bandwidth. Shorter is better."
)
_FIRST = (
    "Bars: median. Whiskers: to p99. Strokes across bars: the time that the prompt's operations take at the measured float32 "
    "speed; quantized products may pass it. Shorter is better."
)
_STREAMS = (
    "A closed loop: every stream asks for its next answer when it has got the last. Tokens a second are of all streams, "
    "with prefill's time; strokes span the repeats. Times are medians; strokes go to p90."
)
_OPEN = (
    "An open loop: requests arrive as a Poisson process, whether the server keeps up or not, and times count from the arrival. "
    "Strokes as above."
)
_BESIDE = (
    "One dot a repeat: the figure of one divided by the other's in the same repeat, so that a drift of the machine cancels. "
    "The stroke is the median. A dot has the colour of the one that it favours."
)

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f8;--card:#fff;--ink:#16191d;--soft:#5c636c;--edge:#e3e5e8}
@media (prefers-color-scheme:dark){:root{--page:#111417;--card:#1a1e23;--ink:#e8eaed;--soft:#a4abb4;--edge:#2c3138}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:20px 16px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:26px}h2{margin:36px 0 2px;font-size:20px}h3{margin:0 0 12px;font-size:15px}
p{margin:4px 0 12px;color:var(--soft);max-width:80ch}
.limits{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0;padding:0;list-style:none}
.limits li{flex:1 1 240px;padding:10px 14px;background:var(--card);border:1px solid var(--edge);
border-radius:10px;color:var(--soft)}
.limits b{display:block;font-size:20px;color:var(--ink)}
pre{margin:0;padding:10px 14px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;background:var(--card);
border:1px solid var(--edge);border-radius:10px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:14px}
figure{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--edge);border-radius:10px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px}
table{width:100%;border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--edge)}
tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}
.notes{padding-left:18px;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
"""

Card = tuple[str, str]
"""A title and a plot."""


def _section(title: str, explained: str, cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    figures = "".join(f"<figure><h3>{escape(name)}</h3>{plot}</figure>" for name, plot in cards)
    words = f"<p>{escape(explained)}</p>" if explained else ""
    return f'<section><h2>{escape(title)}</h2>{words}<div class="cards">{figures}</div></section>\n'


def _by_load(report: Report) -> dict[tuple[int, float | None], list[Result]]:
    found: dict[tuple[int, float | None], list[Result]] = {}
    for result in report.results:
        found.setdefault((result.streams, result.arrivals), []).append(result)
    return found


def _between(report: Report, inks: dict[str, Ink]) -> list[Card]:
    """Bars of the time between tokens, a card a load."""

    def bar(result: Result) -> Bar | None:
        middle, high, share = result.inter_token(0.9), result.inter_token(0.99), result.bandwidth_share(report.machine)
        if (p50 := result.inter_token(0.5)) is None or middle is None or high is None:
            return None
        detail = f"p99 {_ms(high)}" + (f", {share:.0%} of limit" if share is not None else "")
        limit = None if share is None else 1e3 * share * p50
        ink = inks[result.what]
        return Bar(result.what, ink, p50 * 1e3, f"{_ms(p50)} ms", detail, middle * 1e3, high * 1e3, limit)

    return _bar_cards(report, bar, "ms")


def _first(report: Report, inks: dict[str, Ink]) -> list[Card]:
    """Bars of the time to the first token, a card a load."""

    def bar(result: Result) -> Bar | None:
        high, share = result.first_token_at(0.99), result.sgemm_share(report.machine)
        if (p50 := result.first_token_at(0.5)) is None or high is None:
            return None
        detail = f"p99 {_ms(high)}" + (f", {share:.0%} of limit" if share is not None else "")
        limit = None if share is None else 1e3 * share * p50
        return Bar(result.what, inks[result.what], p50 * 1e3, f"{_ms(p50)} ms", detail, high=high * 1e3, limit=limit)

    return _bar_cards(report, bar, "ms")


def _bar_cards(report: Report, bar: Callable[[Result], Bar | None], unit: str) -> list[Card]:
    cards = []
    for (streams, arrivals), results in _by_load(report).items():
        rows = [row for result in results if (row := bar(result)) is not None]
        if rows:
            cards.append((_load_in_words(streams, arrivals), plots.bars(rows, unit)))
    return cards


def _by_streams(report: Report, inks: dict[str, Ink]) -> list[Card]:
    """Lines by streams where there are several numbers of them, bars of the throughput otherwise."""
    closed = [result for result in report.results if result.arrivals is None]
    if len({result.streams for result in closed}) > 1:
        return _line_cards(closed, inks, lambda result: float(result.streams), "streams")

    def bar(result: Result) -> Bar | None:
        rate = result.tokens_per_second if result.arrivals is None else None
        return None if rate is None else Bar(result.what, inks[result.what], rate, f"{rate:.1f}", "tokens/s")

    return _bar_cards(report, bar, "tokens/s")


def _by_arrivals(report: Report, inks: dict[str, Ink]) -> list[Card]:
    """What becomes of throughput and latency as requests arrive faster."""
    open_ = [result for result in report.results if result.arrivals is not None]
    return _line_cards(open_, inks, lambda result: result.arrivals or 0.0, "requests arriving a second")


def _line_cards(results: list[Result], inks: dict[str, Ink], x: Callable[[Result], float], x_title: str) -> list[Card]:
    names = list(dict.fromkeys(result.what for result in results))
    cards = []
    for title, span, unit in (
        ("tokens a second", _rates, "tokens/s"),
        ("time to the first token", _first_times, "ms"),
        ("time between tokens", _inter_times, "ms"),
    ):
        points = {name: {x(result): span(result) for result in results if result.what == name} for name in names}
        known = {name: {at: s for at, s in spans.items() if s is not None} for name, spans in points.items()}
        series = [Line(name, inks[name], spans) for name, spans in known.items() if spans]
        if series:
            cards.append((title, plots.lines(series, x_title, unit)))
    return cards


Span = tuple[float, float, float] | None
"""From, value, to."""


def _rates(result: Result) -> Span:
    rate = result.tokens_per_second
    return None if rate is None else (min(result.rates), rate, max(result.rates))


def _first_times(result: Result) -> Span:
    return _to_p90(result.first_token_at)


def _inter_times(result: Result) -> Span:
    return _to_p90(result.inter_token)


def _to_p90(time_at: Callable[[float], float | None]) -> Span:
    middle, high = time_at(0.5), time_at(0.9)
    return None if middle is None or high is None else (1e3 * middle, 1e3 * middle, 1e3 * high)


def _beside(report: Report, inks: dict[str, Ink]) -> list[Card]:
    """Dots of the ratios, a card a pair."""
    pairs: dict[tuple[str, str], list[Spread]] = {}
    for ratio in _valued(report):
        middle = ratio.median or 0.0
        ours, theirs = inks.get(ratio.what, Ink(plots.COLOURS)), inks[ratio.against]
        more_is_better = ratio.figure == RATE
        values = [(value, ours if (value > 1) == more_is_better else theirs) for value in ratio.values]
        spread = f"{min(ratio.values):.2f} to {max(ratio.values):.2f}"
        name = f"{ratio.figure}, {_load_in_words(ratio.streams, ratio.arrivals)}"
        label = f"{middle:.2f} × the {'rate' if more_is_better else 'time'}"
        pairs.setdefault((ratio.what, ratio.against), []).append(Spread(name, label, spread, middle, values))
    return [
        (f"{what}, beside {against}", plots.spreads(rows, f"{what} / {against}")) for (what, against), rows in pairs.items()
    ]


def _standing(report: Report, inks: dict[str, Ink]) -> list[Card]:
    """Bars of what does not depend on the load: the first figure of each that was measured."""
    starts: dict[str, Bar] = {}
    memory: dict[str, Bar] = {}
    quality: dict[str, Bar] = {}
    for result in report.results:
        name, ink = result.what, inks[result.what]
        if result.start_seconds is not None and name not in starts:
            starts[name] = Bar(name, ink, result.start_seconds, f"{result.start_seconds:.2f} s")
        if result.rss is not None:
            most = max(result.rss / 1e6, memory[name].value if name in memory else 0.0)
            memory[name] = Bar(name, ink, most, f"{most:,.0f} MB")
        if result.perplexity is not None and name not in quality:
            reference = result.reference_perplexity
            beside = f"{result.perplexity / reference - 1:+.2%} of float32's" if reference else ""
            quality[name] = Bar(name, ink, result.perplexity, f"{result.perplexity:.2f}", beside, limit=reference)
    shown = (
        ("from start to the first token", starts, "s"),
        ("resident memory, the most over the loads", memory, "MB"),
        ("perplexity; strokes: transformers in float32", quality, ""),
    )
    return [(title, plots.bars(list(rows.values()), unit)) for title, rows, unit in shown if rows]


def _all_figures(report: Report) -> str:
    titles, rows = figures(report)
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    notes = "".join(f"<li>{escape(words)}</li>" for words in _notes(report))
    return (
        '<section><h2>All figures</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</section>"
    )
