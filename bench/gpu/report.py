"""A run's figures as tables and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.gpu.measure import Decode, Report


def show(report: Report, console: Console) -> None:
    """Print `report`."""
    machine, bandwidth = report.machine, report.bandwidth
    console.print(f"{machine.gpu}, {machine.memory / 2**30:.0f} GiB, driver {machine.driver}, {machine.date}")
    console.print(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    if bandwidth is not None:
        console.print(
            f"memory: {bandwidth.copy / 1e12:.2f} TB/s copying (read and written), {bandwidth.read / 1e12:.2f} TB/s reading; "
            "the larger one is the limit"
        )
    for found in report.tokens:
        console.print(
            f"{found.what}: {found.equal} of {found.compared} greedy tokens are transformers', {found.ties} tied, "
            f"{found.distinct} distinct{'; ' + found.first if found.first else ''}"
        )
    if report.decode:
        console.print(_decode(report))
        console.print("idle: of a step, when the GPU has nothing to do; host: when the process does not wait for the GPU")
    if report.first_tokens:
        console.print(_first_tokens(report))
    for note in report.notes:
        console.print(note, markup=False)
    for failure in report.failures:
        console.print(f"no figure: {failure.part}: {failure.reason}", markup=False)
    console.print(f"{report.seconds:.0f} s in all")


def write(report: Report, path: Path) -> None:
    """`report`, with every value that was measured, as JSON; and the medians that the tables show."""
    content = asdict(report)
    for figure, entry in zip(report.decode, content["decode"], strict=True):
        entry |= {
            "tokens_per_second": figure.rate,
            "bandwidth_share": figure.share(report.bandwidth),
            "idle": figure.idle,
            "idle_alone": figure.idle_alone,
        }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _decode(report: Report) -> Table:
    table = Table(title="Decoding")
    table.add_column("")
    for name in ("batch", "tok/s", "ms a step", "of the limit", "GPU ms", "idle µs", "idle µs, no step ahead", "host µs"):
        table.add_column(name, justify="right")
    for figure in sorted(report.decode, key=lambda figure: figure.batch):
        share = figure.share(report.bandwidth)
        table.add_row(
            figure.what,
            str(figure.batch),
            _number(figure.rate, 1, 0),
            _number(figure.step, 1e3, 3),
            "" if share is None else f"{share:.0%}",
            _number(_middle(figure.gpu), 1e3, 3),
            _number(figure.idle, 1e6, 0),
            _number(figure.idle_alone, 1e6, 0),
            _number(_middle(figure.host), 1e6, 0),
            end_section=figure is _last(report.decode, figure.batch),
        )
    return table


def _first_tokens(report: Report) -> Table:
    table = Table(title="First token, one prompt alone")
    table.add_column("")
    table.add_column("prompt", justify="right")
    table.add_column("ms", justify="right")
    for figure in sorted(report.first_tokens, key=lambda figure: figure.prompt):
        table.add_row(figure.what, str(figure.prompt), _number(_middle(figure.seconds), 1e3, 1))
    return table


def _last(figures: Sequence[Decode], batch: int) -> Decode:
    return [figure for figure in figures if figure.batch == batch][-1]


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"
