"""What a trial hands back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """Figures, each with its unit in words, and what did not hold."""

    figures: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def expect(self, condition: object, what: str) -> None:
        """Note `what` as broken unless the condition is true."""
        if not condition:
            self.broken.append(what)


@dataclass(frozen=True)
class Trial:
    """One row of the table.

    Attributes:
        says: what is done, and what must hold.
        run: does it.
        full, short: arguments of `run` for a whole trial, and for one of some seconds.
    """

    says: str
    run: Callable[..., Result]
    full: dict[str, Any]
    short: dict[str, Any]
