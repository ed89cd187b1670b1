"""Every evaluation that is a command of its own, in the order in which they are shown."""

from __future__ import annotations

from .drift import DRIFT
from .editing import EDITING
from .fading import FADING
from .inspect import INSPECT
from .longdoc import LONGDOC
from .outcome import Evaluation

EVALUATIONS: dict[str, Evaluation] = {one.name: one for one in (FADING, DRIFT, INSPECT, EDITING, LONGDOC)}
