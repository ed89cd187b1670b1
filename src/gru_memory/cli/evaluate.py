"""`gru-memory eval`: recall; all other evaluations are made into commands by `evaluations.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..embedded import EMBEDDED_NAME
from ..evaluation import RecallConfig, RecallResult, evaluate_recall, standard_suite
from ..evaluation.catalogue import EVALUATIONS
from ..evaluation.recall_table import RECALL, pooled, recall_runs
from ..evaluation.report import write_report
from ..evaluation.results_page import results_page
from ..evaluation.scoring import Rate
from ..plots import plot_recall
from .evaluations import (
    Device,
    Memory,
    Model,
    Out,
    Seeds,
    Threads,
    about_memory,
    check_seeds,
    command_for,
    draw,
    show_table,
)
from .output import check_folder, command_line, console, kilobytes, load, one_line_errors, option, progress, set_threads

app = typer.Typer(help="Measure what a memory recalls, and what it costs.", no_args_is_help=True)


@app.command()
@one_line_errors
def recall(
    facts: Annotated[int, option(RecallConfig, "facts")] = RecallConfig.facts,
    between: Annotated[int, option(RecallConfig, "between")] = RecallConfig.between,
    values: Annotated[str, option(RecallConfig, "values")] = RecallConfig.values,
    phrasings: Annotated[str, option(RecallConfig, "phrasings")] = RecallConfig.phrasings,
    attributes: Annotated[str, option(RecallConfig, "attributes")] = RecallConfig.attributes,
    corrected: Annotated[bool, option(RecallConfig, "corrected", "--corrected")] = RecallConfig.corrected,
    sessions: Annotated[int, option(RecallConfig, "sessions")] = RecallConfig.sessions,
    seed: Annotated[int, option(RecallConfig, "seed")] = RecallConfig.seed,
    max_new_tokens: Annotated[int, option(RecallConfig, "max_new_tokens")] = RecallConfig.max_new_tokens,
    batch_size: Annotated[int, option(RecallConfig, "batch_size")] = RecallConfig.batch_size,
    suite: Annotated[
        bool, typer.Option("--suite", help="the standard table; of the above only the last four options apply")
    ] = False,
    floor: Annotated[bool, typer.Option(help="also ask the base model the question alone")] = True,
    full_history: Annotated[bool, typer.Option(help="also ask the base model with every turn in its context")] = True,
    seeds: Seeds = 1,
    model: Model = EMBEDDED_NAME,
    memory: Memory = None,
    out: Out = Path("results"),
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Facts told, unrelated turns, then questions: how many replies contain the value?"""
    common = {"sessions": sessions, "seed": seed, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if suite:
        rows = standard_suite(**common)
    else:
        rows = [RecallConfig(facts, between, values, phrasings, attributes, corrected, **common)]
    check_seeds(seeds)
    rows = [replace(row, seed=row.seed + number) for number in range(seeds) for row in rows]
    set_threads(threads)
    check_folder(out)
    loaded, tokenizer = load(model, memory, device)
    results: list[RecallResult] = []
    for number, row in enumerate(rows, start=1):
        with progress() as report:

            def tell(what: str, done: int, total: int, at: str = f"{number}/{len(rows)} {row.label}", report=report):
                report(f"{at}: {what}", done, total)

            results.append(evaluate_recall(loaded, tokenizer, row, floor, full_history, tell))
        about = {"evaluation": RECALL.name, **about_memory(loaded, model, memory)}
        write_report(out / "recall.json", command_line(), seed, results, **about)  # a row that is done is never lost
    if seeds == 1:
        _print_recall(results)
    else:
        show_table(RECALL, recall_runs([result.to_json() for result in results]))
    console.print(f"Every reply: {out / 'recall.json'}", highlight=False)
    picture = out / "recall.png"
    draw(lambda: plot_recall(pooled(results), picture, f"Recall, {model}"), picture)


@app.command()
@one_line_errors
def results(
    folder: Annotated[Path, typer.Option(help="where the evaluations wrote to")] = Path("results"),
    out: Annotated[Path, typer.Option(help="the page, in Markdown")] = Path("docs/results.md"),
) -> None:
    """Make the page of results from what the evaluations wrote."""
    few = results_page(folder, out)
    console.print(f"Written: {out}", highlight=False)
    if few:
        console.print(f"[yellow]fewer than three seeds: {', '.join(few)}; run them with --seeds 3[/yellow]")


for _evaluation in EVALUATIONS.values():
    app.command(_evaluation.name)(command_for(_evaluation))


def _print_recall(results: list[RecallResult]) -> None:
    table = Table(title="Replies that contain the value (95% interval)", title_justify="left")
    table.add_column("told and asked")
    for name in ("memory", "all in context", "question alone"):
        table.add_column(name, justify="right")
    with_old = any(result.old_value for result in results)
    if with_old:
        table.add_column("memory: old value", justify="right")
    table.add_column("state file", justify="right")
    table.add_column("KV cache", justify="right")
    for result in results:
        row = [result.config.label, *map(_share, (result.memory, result.full_history, result.floor))]
        if with_old:
            row.append(_share(result.old_value["memory"] if result.old_value else None))
        row.append(kilobytes(result.state_bytes))
        row.append("" if result.kv_bytes is None else kilobytes(result.kv_bytes))
        table.add_row(*row)
    console.print(table)
    if dropped := sum(result.dropped_turns for result in results):
        console.print(f"{dropped} oldest turns did not fit into the context of the base model.", highlight=False)


def _share(rate: Rate | None) -> str:
    return "" if rate is None else f"{100 * rate.share:.0f}% ({100 * rate.low:.0f}-{100 * rate.high:.0f})"
