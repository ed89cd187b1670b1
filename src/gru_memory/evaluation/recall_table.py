"""Recall in the form of all evaluations, for tables over seeds and the page of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .outcome import Columns, Figure
from .recall import RecallResult
from .scoring import Rate

_SHARES = {"memory": "memory", "full_history": "all in context", "floor": "question alone"}


def recall_runs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `evaluate_recall` found, as JSON, one run a seed."""
    runs: dict[int, dict[str, Any]] = {}
    for result in results:
        row: dict[str, Any] = {"label": result["label"]}
        row |= {name: result[name] and result[name]["share"] for name in _SHARES}
        old = result["old_value"] and result["old_value"].get("memory")
        row |= {"old_value": old and old["share"], "questions": result["memory"]["total"]}
        row |= {"state_bytes": result["state_bytes"], "kv_bytes": result["kv_bytes"]}
        seed = result["config"]["seed"]
        run = runs.setdefault(seed, {"config": {"seed": seed}, "seconds": 0.0, "rows": [], "details": {}})
        run["rows"].append(row)
        run["seconds"] += sum(result["seconds"].values())
    return list(runs.values())


def pooled(results: Sequence[RecallResult]) -> list[RecallResult]:
    """Rows of the same label with the questions of all seeds together, for one picture of them; replies stay apart."""
    rows: dict[str, list[RecallResult]] = {}
    for result in results:
        rows.setdefault(result.config.label, []).append(result)
    return [
        replace(
            same[0], **{name: _together([getattr(result, name) for result in same]) for name in _SHARES}, replies=[]
        )
        for same in rows.values()
    ]


def _together(rates: Sequence[Rate | None]) -> Rate | None:
    if any(rate is None for rate in rates):
        return None
    hits, total = sum(rate.hits for rate in rates), sum(rate.total for rate in rates)
    return Rate.of([True] * hits + [False] * (total - hits))


RECALL = Columns(
    name="recall",
    about="Replies that contain the value that was told, with nothing of it in the context.",
    labels={"label": "told and asked"},
    figures={
        **{name: Figure(title, "share") for name, title in _SHARES.items()},
        "old_value": Figure("memory: old value", "share"),
        "questions": Figure("questions", "count"),
        "state_bytes": Figure("state file", "bytes"),
        "kv_bytes": Figure("KV cache", "bytes"),
    },
)
