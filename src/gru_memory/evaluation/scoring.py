"""When a reply is right, and how sure a share of right replies is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class Rate:
    """How many of how many, with a 95% Wilson interval (it takes the questions of one session as independent)."""

    hits: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Rate:
        hits, total = sum(flags), len(flags)
        return cls(hits, total, hits / total if total else 0.0, *wilson_interval(hits, total))


def contains(reply: str, value: str) -> bool:
    """Whether the value is in the reply as words of its own: case and white space do not matter, and 47 is not in 4471,
    47.5, or 1:47."""
    wanted = _plain(value)
    if not wanted:
        return False
    pattern = rf"(?<!\w)(?<!\w-)(?<!\d[.,:]){re.escape(wanted)}(?!\w)(?!-\w)(?![.,:]\d)"
    return re.search(pattern, _plain(reply)) is not None


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share; sensible near 0 and 1, unlike the plain one. No data: everything is possible."""
    if not 0 <= hits <= total:
        raise ValueError(f"{hits} of {total} is not a share")
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def _plain(text: str) -> str:
    same = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u2018", "'")
    return " ".join(same.casefold().split())
