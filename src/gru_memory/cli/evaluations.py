"""Commands made from evaluations: an option for every setting, a JSON file, a table and a picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

import torch
import typer
from rich.markup import escape
from rich.table import Table

from ..embedded import EMBEDDED_NAME
from ..evaluation.outcome import Columns, Evaluation, Needs, table
from ..evaluation.report import write_report
from .output import (
    DEVICE_HELP,
    MEMORY_HELP,
    MODEL_HELP,
    check_folder,
    command_line,
    console,
    load,
    load_base,
    one_line_errors,
    progress,
    set_threads,
)

Model = Annotated[str, typer.Option(help=MODEL_HELP)]
Memory = Annotated[Optional[str], typer.Option(help=MEMORY_HELP)]  # noqa: UP045 (typer on Python 3.10)
Out = Annotated[Path, typer.Option(help="folder for the results")]
Device = Annotated[Optional[str], typer.Option(help=DEVICE_HELP)]  # noqa: UP045
Threads = Annotated[Optional[int], typer.Option(help="threads of torch")]  # noqa: UP045
Seeds = Annotated[int, typer.Option(help="runs: with the seed, the one after it, and so on; tables give their spread")]

SHARED = {
    "seeds": (Seeds, 1),
    "model": (Model, EMBEDDED_NAME),
    "memory": (Memory, None),
    "out": (Out, Path("results")),
    "device": (Device, None),
    "threads": (Threads, None),
}


# Options that say nothing where no trained memory, or no model, is asked for.
LEFT_OUT = {Needs.MEMORY: (), Needs.MODEL: ("memory",), Needs.NOTHING: ("model", "memory", "device")}


def command_for(evaluation: Evaluation) -> Callable[..., None]:
    """The command of an evaluation."""

    offered = {name: SHARED[name] for name in SHARED if name not in LEFT_OUT[evaluation.needs]}

    def run(**options: Any) -> None:
        shared = {name: options.pop(name) for name in offered}
        config = evaluation.config(**{name: _value(evaluation.config, name, given) for name, given in options.items()})
        run_evaluation(evaluation, config, **shared)

    parameters, hints = [], get_type_hints(evaluation.config)
    for one in fields(evaluation.config):
        default = one.default_factory() if one.default is MISSING else one.default
        kind = _option_type(hints[one.name])
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        declared = Annotated[kind, typer.Option(help=one.metadata["help"])]
        parameters.append(_parameter(one.name, declared, default))
    parameters += [_parameter(name, declared, default) for name, (declared, default) in offered.items()]
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = evaluation.name.replace("-", "_"), evaluation.about
    return one_line_errors(run)


def run_evaluation(
    evaluation: Evaluation,
    config: Any,
    seeds: int,
    out: Path,
    threads: int | None,
    model: str | None = None,
    memory: str | None = None,
    device: str | None = None,
) -> None:
    """Run it once a seed, write what was found after every run, and show the table."""
    check_seeds(seeds)
    set_threads(threads)
    check_folder(out)
    loaded, tokenizer, about = _given(evaluation.needs, model, memory, device)
    path = out / f"{evaluation.name}.json"
    runs: list[dict[str, Any]] = []
    outcomes = []
    for number in range(seeds):
        with progress() as report:

            def tell(what: str, done: int, total: int, at: int = number, report: Callable[..., None] = report) -> None:
                report(what if seeds == 1 else f"{at + 1}/{seeds} {what}", done, total)

            outcomes.append(evaluation.run(loaded, tokenizer, replace(config, seed=config.seed + number), tell))
        write_report(path, command_line(), config.seed, outcomes, evaluation=evaluation.name, **about)
        runs = [outcome.to_json() for outcome in outcomes]
    show_table(evaluation, runs)
    console.print(f"{sum(run['seconds'] for run in runs):.0f} s. Everything measured: {path}", highlight=False)
    picture = path.with_suffix(evaluation.suffix)
    title = evaluation.name if model is None else f"{evaluation.name}, {'/'.join(Path(model).parts[-2:])}"
    draw(lambda: evaluation.plot(runs, picture, title), picture)


def _given(needs: Needs, model: str | None, memory: str | None, device: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Model and tokenizer for an evaluation, and what its report says about them."""
    if needs is Needs.NOTHING:
        return None, None, {"model": "small ones of its own", "memory": {"from": "trained here"}}
    if needs is Needs.MODEL:
        loaded, tokenizer = load_base(model, device)
        return loaded, tokenizer, {"model": model, "device": name_of(loaded), "memory": {"from": "trained here"}}
    loaded, tokenizer = load(model, memory, device)
    return loaded, tokenizer, about_memory(loaded, model, memory)


def show_table(evaluation: Columns, runs: list[dict[str, Any]]) -> None:
    """The table of an evaluation; figures of several runs as mean ± standard deviation."""
    headings, cells = table(runs, evaluation)
    shown = Table(title=escape(evaluation.about), title_justify="left")
    for number, heading in enumerate(headings):
        width = max((len(row[number]) for row in cells), default=0)  # headings may fold, figures must not be cut
        side = "left" if number < len(evaluation.labels) else "right"
        shown.add_column(escape(heading), justify=side, min_width=min(width, 16), overflow="fold")
    for row in cells:
        shown.add_row(*map(escape, row))
    console.print(shown)


def draw(plot: Callable[[], None], picture: Path) -> None:
    """Draw, or say what to install: a picture less is no reason to fail."""
    try:
        plot()
        console.print(f"As a picture: {picture}", highlight=False)
    except ModuleNotFoundError as error:
        console.print(f"[yellow]{escape(str(error))}[/yellow]")


def about_memory(loaded: Any, model: str, memory: str | None) -> dict[str, Any]:
    """What was measured, for the report."""
    return {
        "model": model,
        "device": name_of(loaded),
        "memory": {
            "from": memory or "shipped",
            "fingerprint": loaded.memory_fingerprint(),
            "config": loaded.memory_config.to_dict(),
        },
    }


def name_of(model: Any) -> str:
    """Of the device that a model is on: "cpu", or a GPU's name."""
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)


def check_seeds(seeds: int) -> None:
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: it must be at least 1")


def _parameter(name: str, declared: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=declared)


def _option_type(hint: Any) -> Any:
    """What typer is told of a field: numbers in a tuple are given as text, with commas between."""
    if get_origin(hint) is tuple:
        return str
    if get_origin(hint) is not None:  # `str | None`
        return Optional[next(kind for kind in get_args(hint) if kind is not type(None))]  # noqa: UP045
    return hint


def _value(config: type, name: str, given: Any) -> Any:
    hint = get_type_hints(config)[name]
    if get_origin(hint) is not tuple:
        return given
    kind = get_args(hint)[0]
    try:
        values = tuple(kind(part) for part in given.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{name} is {given!r}: give numbers with commas between, such as 1,2,5") from error
    if kind is float and not all(map(math.isfinite, values)):
        raise ValueError(f"{name} is {given!r}: every number must be finite")
    return values
