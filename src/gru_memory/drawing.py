"""What every picture shares: matplotlib where it is installed, colours that all kinds of colour vision tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's, darkest first after the two that pictures of recall use.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure_class() -> Any:
    """`matplotlib.figure.Figure`. Raises ModuleNotFoundError that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; plots need: pip install 'gru-memory[plots]'", name=error.name) from error
    return Figure


def panels(count: int, width: float = 5.2, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure and `count` axes side by side, without the frame's upper right half. Sizes in inches a panel."""
    figure = figure_class()(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0].tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def save(figure: Any, path: str | Path) -> None:
    """Write a picture in the format of its suffix."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
