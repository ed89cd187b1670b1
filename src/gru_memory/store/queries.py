"""Which rows of the tables are asked for, and the records that are made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select

from .records import Session, TurnRecord
from .schema import sessions, snapshots


def rows_of(session_id: str) -> Any:
    """Query of all a session has, states included, the oldest turn first."""
    return select(snapshots).where(snapshots.c.session_id == session_id).order_by(snapshots.c.number)


def turns_in(session_id: str) -> Any:
    """Query of a session's turns, the oldest first."""
    return turns_where(snapshots.c.session_id == session_id).order_by(snapshots.c.number)


def kept_states(session_id: str) -> Any:
    """Query of the snapshots of a session that have a state, the oldest first: what places them in its tree."""
    columns = (snapshots.c.id, snapshots.c.parent, snapshots.c.number, snapshots.c.turn_digest)
    mine = snapshots.c.session_id == session_id
    return select(*columns).where(mine, snapshots.c.state.is_not(None)).order_by(snapshots.c.number)


def turns_where(*where: Any) -> Any:
    """Query of turns without their states, which are large."""
    light = [column for column in snapshots.c if column.name != "state"]
    has_state = snapshots.c.state.is_not(None).label("has_state")
    return select(*light, has_state).join(sessions, sessions.c.id == snapshots.c.session_id).where(*where)


def turn_of(row: Row) -> TurnRecord:
    return TurnRecord(
        row.id, row.parent, row.number, row.created_at, row.turn_digest, row.user_digest, bool(row.has_state),
        row.user_text, row.reply_text, None if row.about is None else json.loads(row.about),
    )  # fmt: skip


def session_of(row: Row | dict[str, Any]) -> Session:
    values = dict(row) if isinstance(row, dict) else dict(row._mapping)
    return Session(**{**values, "settings": json.loads(values["settings"])})


def path_to(rows: Sequence[Any], at: str | None) -> list[Any]:
    """The rows from the root to the one whose id is `at`; empty if there is none."""
    by_id = {_field(row, "id"): row for row in rows}
    path = []
    while (row := by_id.pop(at, None)) is not None:
        path.append(row)
        at = _field(row, "parent")
    return path[::-1]


def _field(row: Any, name: str) -> Any:
    return getattr(row, name) if isinstance(row, TurnRecord) else row[name]
