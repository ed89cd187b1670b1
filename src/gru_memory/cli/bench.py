"""`gru-memory bench`: how fast, against what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from ..bench import BENCHMARKS, Plan, Row, check_names, judge, ratio, read_rows, run_benchmarks, why_nothing, write_rows
from ..bench.measure import DECODING
from ..bench.peers import missing
from ..bench.report import against, exponents
from .output import check_folder, command_line, console, kilobytes, one_line_errors, option, progress, set_threads


@one_line_errors
def bench_command(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer on Python 3.10)
        typer.Argument(help=f"which benchmarks: {', '.join(BENCHMARKS)}; all of them if none is named"),
    ] = None,
    rounds: Annotated[int, option(Plan, "rounds")] = Plan.rounds,
    clock: Annotated[str, option(Plan, "clock")] = Plan.clock,
    where: Annotated[Optional[list[str]], option(Plan, "where")] = None,  # noqa: UP045
    patience: Annotated[float, option(Plan, "patience")] = Plan.patience,
    quick: Annotated[bool, option(Plan, "quick", "--quick")] = Plan.quick,
    out: Annotated[Path, typer.Option(help="folder for bench.json and bench.png")] = Path("results"),
    threads: Annotated[Optional[int], typer.Option(help="threads of torch")] = None,  # noqa: UP045
) -> None:
    """Speed and memory against the model alone and against peers, everything compared in one run and in turn."""
    plan = Plan(rounds, clock, quick, tuple(where or ()), patience)
    check_names(names or ())
    set_threads(threads)
    check_folder(out)
    if absent := missing():
        console.print(
            f"[yellow]not installed, so left out: {', '.join(absent)} (pip install 'gru-memory\\[bench]')[/yellow]"
        )
    rows: list[Row] = []
    nothing = []
    with progress() as report:
        for name in names or BENCHMARKS:
            if found := run_benchmarks([name], plan, report)[name]:
                rows += found
                write_rows(out / "bench.json", command_line(), plan, rows)  # what is done is never lost
            else:
                nothing.append(why_nothing(name, plan))
    if not rows:
        raise ValueError(f"nothing was measured. {'; '.join(nothing)}")
    for reason in nothing:
        console.print(f"[yellow]not measured: {escape(reason)}[/yellow]", highlight=False)
    for name in dict.fromkeys(row.benchmark for row in rows):
        _print_rows(name, [row for row in rows if row.benchmark == name])
    _print_growth(rows)
    _print_targets(rows)
    console.print(f"Everything measured: {out / 'bench.json'}", highlight=False)
    try:
        from ..bench.figure import plot_rows

        plot_rows(read_rows(out / "bench.json"), out / "bench.png")
        console.print(f"As a picture: {out / 'bench.png'}", highlight=False)
    except ModuleNotFoundError as error:
        console.print(f"[yellow]{escape(str(error))}[/yellow]")


def _print_rows(name: str, rows: list[Row]) -> None:
    shown = list(dict.fromkeys(key for row in rows for key in row.setting))
    table = Table(title=name, title_justify="left")
    for heading in [*shown, "case"]:
        table.add_column(heading)
    rates = ["tokens/s"] if name in DECODING else []
    peaks = ["peak memory"] if any(row.peak_bytes is not None for row in rows) else []
    kept = ["kept"] if any(row.kept_bytes is not None for row in rows) else []
    for heading in ("time", "spread", "per token or turn", *rates, "ratio", "lowest-highest", *peaks, *kept):
        table.add_column(heading, justify="right")
    for row in rows:
        base = None if row.left_out else against(row, rows)
        middle, low, high = (None, None, None) if base is None else ratio(row, base)
        table.add_row(
            *(str(row.setting.get(key, "")) for key in shown),
            row.case,
            f"left out: {row.left_out}" if row.left_out else milliseconds(row.median),
            "" if row.left_out else f"{100 * row.spread:.0f}%",
            "" if row.left_out else milliseconds(row.median / row.units),
            *(f"{row.tokens_per_second:.3g}" for _ in rates),
            "" if middle is None else f"{middle:.3g}",
            "" if middle is None else f"{low:.3g}-{high:.3g}",
            *("" if row.peak_bytes is None else kilobytes(row.peak_bytes) for _ in peaks),
            *("" if row.kept_bytes is None else kilobytes(row.kept_bytes) for _ in kept),
        )
    console.print(table, highlight=False)


def _print_growth(rows: list[Row]) -> None:
    found = exponents(rows)
    if not found:
        return
    table = Table(title="cost grows as size to the power of", title_justify="left")
    for heading in ("cell", "size", "time", "peak memory"):
        table.add_column(heading)
    for (cell, axis), (time, memory) in found.items():
        table.add_row(cell, axis, f"{time:.2f}", "" if memory is None else f"{memory:.2f}")
    console.print(table, highlight=False)


def _print_targets(rows: list[Row]) -> None:
    outcomes = judge(rows)
    if not outcomes:
        return
    table = Table(title="targets: time or bytes in times of what it is compared with", title_justify="left")
    table.add_column("what")
    for heading in ("at most", "measured", "lowest-highest", ""):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.target.what,
            f"{outcome.target.limit:.3g}",
            f"{outcome.ratio:.3g}",
            f"{outcome.low:.3g}-{outcome.high:.3g}",
            "[green]met[/green]" if outcome.met else "[red]missed[/red]",
        )
    console.print(table, highlight=False)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 10 else f"{seconds:.1f} s"
