"""The model card of a saved memory: README.md with the metadata that the hub reads, and the figures of a recall run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import MemoryConfig

CARD_NAME = "README.md"
TAGS = ("gru-memory", "memory", "recurrent")
_OURS = "<!-- written by gru-memory, and anew at every save_memory; without this line it stays as it is -->"
_METHODS = {
    "memory": "memory",
    "floor": "base model, question alone",
    "full_history": "base model, every turn in its context",
}


def is_ours(text: str) -> bool:
    """Whether this library wrote a card and may write it anew."""
    return _OURS in text


def memory_card(
    config: MemoryConfig,
    base: dict[str, Any],
    num_parameters: int,
    recall: str | Path | dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    repo_id: str | None = None,
    place: dict[str, str] | None = None,
) -> str:
    """The card as text.

    Args:
        config: the memory's.
        base: what `describe_base` says of the model under it.
        num_parameters: of the memory.
        recall: what `gru-memory eval recall` wrote, as a file or its values; None leaves the figures out.
        fields: of `huggingface_hub.ModelCardData`, over those that follow from the memory. Tags and `eval_results` are added
            to ours.
        repo_id: on the hub, if known.
        place: of the memory in that repository, `revision` and `subfolder` as `load_memory` takes them.

    Raises:
        ValueError: `recall` is no result of a recall run, or `fields` are none.
    """
    if not isinstance(fields, dict | None):
        raise ValueError(f"card is {fields!r}: give a dict of fields, such as {{'license': 'mit'}}")
    fields = dict(fields or {})
    report = None if recall is None else _read_recall(recall)
    further, results = fields.pop("tags", None) or (), fields.pop("eval_results", None) or ()
    tags = [*TAGS, *(tag for tag in ([further] if isinstance(further, str) else further) if tag not in TAGS)]
    results = [*([results] if isinstance(results, EvalResult) else results)]
    results += map(_eval_result, report["results"] if report else ())
    base_model = fields.pop("base_model", base.get("name"))
    under = base_model if isinstance(base_model, str) else f"a {base['model_type']} model"
    title = fields.pop("model_name", f"Memory for {under}")
    if results:  # which are of a model that has a name
        fields |= {"model_name": title, "eval_results": results}
    data = ModelCardData(
        library_name=fields.pop("library_name", "gru-memory"),
        base_model=base_model,
        tags=tags,
        pipeline_tag=fields.pop("pipeline_tag", "text-generation"),
        **fields,
    )
    sizes = {
        "sites": ", ".join(config.sites),
        "heads x slots x floats": f"{config.num_heads} x {config.num_slots} x {config.slot_size}",
        "cell": config.cell,
        "decay": f"{config.decay} a {config.decay_every}",
        "key layers": ", ".join(map(str, config.key_layers)) or "none",
        "parameters": f"{num_parameters:,}",
        "base model": f"{under}: {base['num_hidden_layers']} layers, hidden size {base['hidden_size']}",
    }
    parts = [
        f"---\n{data.to_yaml()}\n---",
        _OURS,
        f"# {title}",
        "A small recurrent memory beside a frozen causal language model: what was said stays when it leaves the context. These "
        "files hold the memory alone and no weight of the model under it, which is loaded from where it is published. A "
        "memory works on the very weights it was trained with.",
        _table(["", ""], [[key, str(value)] for key, value in sizes.items()]),
        "## Use",
        f"```python\nfrom gru_memory import AutoModelWithGRUMemory\n\n{_use(base_model, repo_id or 'this folder', place)}\n```",
    ]
    if report is not None:
        parts += ["## Recall", *_recall_section(report)]
    return ModelCard("\n\n".join(parts) + "\n").content


def _use(base_model: Any, where: str, place: dict[str, str] | None) -> str:
    """The code that loads the memory."""
    base = repr(base_model if isinstance(base_model, str) else "the base model")
    if not place:
        return f"model = AutoModelWithGRUMemory.from_pretrained({base}, memory={where!r})"
    arguments = ", ".join([repr(where), *(f"{name}={value!r}" for name, value in place.items())])
    return f"model = AutoModelWithGRUMemory.from_pretrained_with_memory({base})\nmodel.load_memory({arguments})"


def _read_recall(recall: str | Path | dict[str, Any]) -> dict[str, Any]:
    where = "recall" if isinstance(recall, dict) else str(recall)
    try:
        report = recall if isinstance(recall, dict) else json.loads(Path(recall).read_text(encoding="utf-8"))
        for row in report["results"]:
            str(row["label"]), [_rate(row[method]) for method in _METHODS if row[method] is not None]
            float(row["memory"]["share"]), int(row["state_bytes"])
        if not report["results"]:
            raise KeyError("results")
    except (
        OSError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{where} is not what `gru-memory eval recall` writes ({type(error).__name__}: {error}): give its recall.json"
        ) from error
    return report


def _eval_result(row: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Recall of facts that left the context",
        dataset_type="synthetic",
        dataset_name="Facts told in a conversation",
        dataset_config=str(row["label"]),  # rows that differ in nothing but their dataset's name are taken for one
        metric_type="accuracy",
        metric_name="share of replies that contain the value",
        metric_value=round(float(row["memory"]["share"]), 4),
    )


def _recall_section(report: dict[str, Any]) -> list[str]:
    rows = report["results"]
    methods = [method for method in _METHODS if any(row[method] is not None for row in rows)]
    table = [
        [str(row["label"]), *("" if row[method] is None else _rate(row[method]) for method in methods)] for row in rows
    ]
    versions = (report.get("environment") or {}).get("versions") or {}
    made = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    command = str(report.get("command") or "gru-memory eval recall")
    return [
        "Greedy replies that contain the value asked for, with nothing of the facts in the context (but where it says so); 95% "
        f"intervals in brackets. A conversation's state is a file of {max(int(row['state_bytes']) for row in rows):,} bytes.",
        _table(["session", *(_METHODS[method] for method in methods)], table),
        f"`{_without_folders(command)}`" + (f" ({made})" if made else ""),
    ]


def _rate(rate: dict[str, Any]) -> str:
    return f"{rate['share']:.0%} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f}), {rate['hits']} of {rate['total']}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in line) + " |" for line in lines
    )


def _without_folders(command: str) -> str:
    """The command without the folders of the machine it ran on: a card is read by everybody."""
    try:
        words = shlex.split(command)
    except ValueError:
        return "gru-memory eval recall"
    shown = []
    for word in words:
        flag, equals, value = word.rpartition("=")
        absolute = value.startswith(("/", "~")) or Path(value).is_absolute()
        shown.append(flag + equals + (Path(value).name if absolute else value))
    return shlex.join(shown).replace("`", "'")
