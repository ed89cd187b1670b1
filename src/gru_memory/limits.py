"""What settings may be, for those who take them from a user."""

from __future__ import annotations

from typing import Any


def at_least(config: Any, least: float, *names: str) -> None:
    """Raise ValueError unless every named setting, or every number in it, is at least `least`."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            raise ValueError(f"{name} is empty: give at least one number")
        if not all(one >= least for one in values):  # NaN is not
            raise ValueError(f"{name} is {', '.join(map(str, values))}: it must be at least {least}")


def shares(config: Any, *names: str) -> None:
    """Raise ValueError unless every named setting is a share."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it is a share, between 0 and 1")
