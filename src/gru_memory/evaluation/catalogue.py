"""Every evaluation that is a command of its own, in the order in which they are shown."""

from __future__ import annotations

from .fading import FADING
from .outcome import Evaluation

EVALUATIONS: dict[str, Evaluation] = {one.name: one for one in (FADING,)}
