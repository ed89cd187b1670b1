"""What all commands share: the console, progress bars, one-line errors and the options made from dataclasses."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .. import embedded
from ..embedded import EmbeddedModelError
from ..placement import device_for
from ..store import StoreError
from ..whole_files import write_whole

MODEL_HELP = "'smollm2' (embedded), a folder, a .gguf file or a hub name"
MEMORY_HELP = "folder of a trained memory; the one that ships with the library if not given"
DEVICE_HELP = "'cuda', 'cuda:1', 'cpu' ...; a GPU that torch can use if there is one, else the CPU, if not given"
STORE_HELP = "where sessions are: a SQLite file or postgresql://...; $GRU_MEMORY_STORE, or a file in your data folder, if not given"

_FILE_WIDTH = 160  # columns of what goes into a pipe or a file, unless COLUMNS says how many: tables are whole there


class _Console(Console):
    """Knows that a file is wider than a terminal: rich would cut tables in one to 80 columns."""

    @property
    def size(self) -> ConsoleDimensions:
        size = super().size
        return size if self.is_terminal or "COLUMNS" in os.environ else ConsoleDimensions(_FILE_WIDTH, size.height)


console = _Console()
errors = _Console(stderr=True)

# C0 and C1 but line feeds and tabs: to a terminal these are commands.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

# What a wrong argument, file or machine can lead to. Everything else is a bug, and shows its traceback.
_EXPECTED = (ValueError, OSError, ModuleNotFoundError, EmbeddedModelError, FloatingPointError, StoreError)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command end with a red line and exit code 1 instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError as error:  # who read the output has left (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain at its exit
            raise typer.Exit(1) from error
        except _EXPECTED as error:
            errors.print(Text(f"error: {_said(error)}", style="red"), soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            errors.print(Text("interrupted", style="red"))
            raise typer.Exit(130) from error

    return run


def _said(error: Exception) -> str:
    """What an error says; of a file that cannot be used its name, as it was given, and why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for every (what, done, total) that is reported inside; in a log, a line now and then."""
    if not errors.is_terminal:
        with _one_bar_at_a_time():
            yield _Lines().report
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bars, _one_bar_at_a_time():
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


class _Lines:
    """Progress where no bar can move: how far it is, no oftener than every ten seconds."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._began = self._said = time.monotonic()

    def report(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said >= self.SECONDS:
            self._said = now
            errors.print(f"{what}: {done} of {total}, {now - self._began:.0f} s", highlight=False, soft_wrap=True)


def load(model: str, memory: str | None, device: str | None) -> tuple[Any, Any]:
    """The model with its memory, on its device, and the tokenizer; says so while it takes its time."""
    from ..shipped import load_with_memory

    there = device_for(device)  # refused before the model takes its time
    with errors.status(f"loading {model}"), _one_bar_at_a_time():
        return load_with_memory(model, memory, there)


def load_base(model: str, device: str | None) -> tuple[Any, Any]:
    """The model without a memory, on its device, and the tokenizer; says so while it takes its time."""
    there = device_for(device)
    with errors.status(f"loading {model}"), _one_bar_at_a_time():
        loaded, tokenizer = embedded.load_model(model)
        return loaded.to(there), tokenizer


@contextlib.contextmanager
def _one_bar_at_a_time() -> Iterator[None]:
    """Keep bars of the libraries below from breaking into ours; tqdm has no other switch once it is imported."""
    from tqdm import tqdm

    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


def set_threads(threads: int | None) -> None:
    """Threads of torch; None leaves its own choice."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: it must be at least 1")
        torch.set_num_threads(threads)


def harmless(text: str) -> str:
    """Text that somebody else may have written, with its control characters written out, as a terminal may see it."""
    return text.translate(_CONTROLS)


def check_folder(folder: Path) -> None:
    """Raise OSError if nothing could be written into a folder, which need not be there yet: before hours of work are lost."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: name a folder to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written into {there}: name another folder")


def write_new(file: Path, data: bytes) -> None:
    """Write a file that is not there yet, for its owner alone."""
    try:
        write_whole(file, data, private=True, new=True)
    except FileExistsError as error:
        raise ValueError(f"{file} is there already: choose another name") from error


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["gru-memory", *sys.argv[1:]])


def option(config: type, name: str, *flags: str) -> Any:
    """A typer option for a field of a dataclass, with the help that the field carries."""
    return typer.Option(*flags, help=config.__dataclass_fields__[name].metadata["help"])


def kilobytes(count: float) -> str:
    """1,000 bytes to the KB, as files are measured."""
    return f"{count / 1000:,.1f} KB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
