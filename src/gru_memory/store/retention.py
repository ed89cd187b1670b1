"""What a session lets go of when it has more than `Limits` allow: states first, far later what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, exists, func, or_, select, update

from .queries import kept_states
from .records import Limits, is_edit
from .schema import sessions, snapshots


def let_go(connection: Connection, session_id: str, newest: int, limits: Limits) -> None:
    """Bring a session back within its limits, after turns were added, the last of which has the number `newest`.

    Of more states than `max_states`, those go first that were continued, the oldest of them first; then those at the ends
    of branches, where somebody may still go on, the oldest first. The head stays, and so does the newest quarter, where
    clients repeat a request whose answer they did not get, or have the last message answered anew. Of more turns than
    `max_turns`, the oldest go, but for the head and the ends of branches that have kept their state.

    The cost does not grow with the number of turns, but with that of states.
    """
    mine = snapshots.c.session_id == session_id
    edge = newest - limits.max_turns
    states = connection.execute(select(func.count()).where(mine, snapshots.c.state.is_not(None))).scalar()
    if states <= limits.max_states and edge <= 0:
        return
    head = connection.execute(select(sessions.c.head).where(sessions.c.id == session_id)).scalar()
    kept = connection.execute(kept_states(session_id).add_columns(_has_descendants().label("has_descendants"))).all()
    continued = _continued(kept)
    if (surplus := states - limits.max_states) > 0:
        old = [row for row in kept[: -max(1, int(limits.max_states) // 4)] if row.id != head]
        old.sort(key=lambda row: (row.id not in continued, row.number))
        gone = {row.id for row in old[:surplus]}
        connection.execute(update(snapshots).where(snapshots.c.id.in_(gone)).values(state=None))
        kept = [row for row in kept if row.id not in gone]
    if edge > 0:
        stay = {head, *(row.id for row in kept if row.number <= edge and row.id not in continued)}
        connection.execute(delete(snapshots).where(mine, snapshots.c.number <= edge, snapshots.c.id.not_in(stay)))


def _has_descendants() -> Any:
    """Whether a turn follows the snapshot; one whose response was deleted, and that none follows, is none."""
    child, grandchild = snapshots.alias(), snapshots.alias()
    followed = exists().where(grandchild.c.parent == child.c.id)
    return exists().where(and_(child.c.parent == snapshots.c.id, or_(child.c.state.is_not(None), followed)))


def _continued(kept: Sequence[Row]) -> set[str]:
    """Ids of those that a turn follows, or in whose place an edited state stands. `kept` is in the order of writing."""
    last_edit = {_turn(row): row.number for row in kept if is_edit(row.id)}
    # The same turn may have been answered twice with the same words; which of the two was edited is not known then.
    answers = Counter(_turn(row) for row in kept if not is_edit(row.id))
    edited = (
        row.id
        for row in kept
        if row.number < last_edit.get(_turn(row), 0) and (is_edit(row.id) or answers[_turn(row)] == 1)
    )
    return {row.id for row in kept if row.has_descendants}.union(edited)


def _turn(row: Row) -> tuple[str | None, bytes]:
    return row.parent, row.turn_digest
