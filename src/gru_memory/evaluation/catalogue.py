"""Every evaluation that is a command of its own, in the order in which they are shown."""

from __future__ import annotations

from .associative import ASSOCIATIVE
from .babi import BABI
from .compare import COMPARE
from .continual import CONTINUAL
from .doubt import DOUBT
from .drift import DRIFT
from .editing import EDITING
from .fading import FADING
from .general import GENERAL
from .grid import GRID
from .harm import HARM
from .inspect import INSPECT
from .isolation import ISOLATION
from .longdoc import LONGDOC
from .outcome import Evaluation
from .people import PEOPLE
from .timeline import TIMELINE
from .untold import UNTOLD

_ALL = (
    GRID,
    UNTOLD,
    GENERAL,
    DOUBT,
    PEOPLE,
    ISOLATION,
    HARM,
    FADING,
    DRIFT,
    LONGDOC,
    ASSOCIATIVE,
    BABI,
    COMPARE,
    INSPECT,
    EDITING,
    CONTINUAL,
    TIMELINE,
)
EVALUATIONS: dict[str, Evaluation] = {one.name: one for one in _ALL}
