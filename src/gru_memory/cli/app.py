"""`gru-memory`: the root command, and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..embedded import EMBEDDED_NAME
from . import bench, chat, evaluate, serve, sessions, train
from .output import (
    DEVICE_HELP,
    MEMORY_HELP,
    MODEL_HELP,
    check_folder,
    console,
    kilobytes,
    load,
    one_line_errors,
    progress,
    set_threads,
)

app = typer.Typer(
    name="gru-memory",
    help="A small, persistent, decaying memory beside any frozen causal language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("chat")(chat.chat_command)
app.command("serve")(serve.serve_command)
app.add_typer(sessions.app, name="sessions")
app.add_typer(evaluate.app, name="eval")
app.command("train")(train.train_command)
app.command("bench")(bench.bench_command)


def _show_version(value: bool) -> None:
    if value:
        console.print(f"gru-memory {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """A small, persistent, decaying memory beside any frozen causal language model."""


@app.command()
@one_line_errors
def demo(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = EMBEDDED_NAME,
    memory: Annotated[Optional[str], typer.Option(help=MEMORY_HELP)] = None,  # noqa: UP045 (typer on Python 3.10)
    out: Annotated[Path, typer.Option(help="folder for the picture of where tokens were written")] = Path("results"),
    device: Annotated[Optional[str], typer.Option(help=DEVICE_HELP)] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="threads of torch")] = None,  # noqa: UP045
) -> None:
    """Tell three facts, talk about ten other things, ask for the facts: with and without a memory."""
    from ..demo import TOLD, UNRELATED, run_demo, write_plot

    set_threads(threads)
    check_folder(out)
    loaded, tokenizer = load(model, memory, device)
    with progress() as report:
        result = run_demo(loaded, tokenizer, progress=report)

    console.print("[bold]Told, one turn each:[/bold]", *(f"  {escape(user)}" for user, _ in TOLD), sep="\n")
    console.print(
        f"[bold]Then {len(UNRELATED)} turns about other things.[/bold] No earlier turn stays in the context.\n"
    )
    table = Table(show_lines=True)
    table.add_column("asked", ratio=2)
    table.add_column("base model,\nquestion alone", ratio=3)
    table.add_column("with memory,\nquestion alone", ratio=3)
    table.add_column("base model,\nall turns in context", ratio=3)
    for answer in result.answers:
        colour = "green" if answer.right else "red"
        shown = f"[{colour}]{escape(answer.memory)}[/{colour}]"
        table.add_row(escape(answer.question), escape(answer.alone), shown, escape(answer.full_history))
    console.print(table)
    for answer in result.answers:
        words = ", ".join(f"{escape(repr(word))} +{score:.1f}" for word, score in answer.recalled)
        console.print(f"  {escape(answer.question)} The memory says: {words} (logits)", highlight=False)

    console.print(
        f"\n[bold]What is best kept after {len(TOLD) + len(UNRELATED)} turns[/bold] (slots' worth that is left):"
    )
    words = [f"{escape(repr(token.text))} {token.left:.1f} ({_place(token.turn)})" for token in result.stored]
    console.print("  " + ", ".join(words), highlight=False)
    console.print("\n[bold]Slots that hold what was told[/bold], made of (weight), and the words that it looks like:")
    table = Table(box=None, show_header=False)
    for slot in result.slots:
        made_of = ", ".join(f"{escape(repr(text))} {weight:.2f}" for text, weight in slot.made_of if weight > 0.05)
        words = ", ".join(escape(repr(word)) for word, _ in slot.words)
        table.add_row(f"head {slot.head}, slot {slot.slot}", made_of, words)
    console.print(table, highlight=False)

    console.print(
        f"\nThe memory of this conversation is a file of {kilobytes(result.state_bytes)} "
        f"({result.kept_in}), however long it gets. "
        f"The KV cache of its {result.history_tokens} tokens is {kilobytes(result.kv_bytes)}.",
        highlight=False,
    )
    path = _plot(lambda: write_plot(result, out))
    console.print(
        f"{result.seconds:.0f} s. " + (f"Where the facts were written: {path}" if path else ""), highlight=False
    )


def _place(turn: int) -> str:
    return "system prompt" if turn < 0 else f"turn {turn + 1}"


def _plot(write) -> Path | None:
    try:
        return write()
    except ModuleNotFoundError as error:  # a picture less is no reason to fail
        console.print(f"[yellow]{escape(str(error))}[/yellow]")
        return None
