"""What settings may be, for those who take them from a user."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def at_least(config: Any, least: float, *names: str) -> None:
    """Raise ValueError unless every named setting, or every number in it, is at least `least` and finite."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            raise ValueError(f"{name} is empty: give at least one number")
        if not all(one >= least for one in values):  # NaN is not
            raise ValueError(f"{name} is {', '.join(map(str, values))}: it must be at least {least}")
        if math.inf in values:
            raise ValueError(f"{name} is {', '.join(map(str, values))}: it must be finite")


def shares(config: Any, *names: str) -> None:
    """Raise ValueError unless every named setting is a share."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it is a share, between 0 and 1")


def choices(config: Any, name: str, allowed: Collection[Any]) -> None:
    """Raise ValueError unless the named setting has something in it, all of it of `allowed`."""
    values = getattr(config, name)
    if unknown := [value for value in values if value not in allowed] if values else ["none"]:
        raise ValueError(f"{name} has {', '.join(map(str, unknown))}: choose of {', '.join(map(str, allowed))}")
