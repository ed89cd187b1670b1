"""The page of results: every table and picture from the JSON files of the evaluations, with where each comes from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .catalogue import EVALUATIONS
from .outcome import Columns, table
from .recall_table import RECALL, recall_runs

SEEDS = 3  # fewer say too little about the spread
LONGEST = 60  # lines of a table; the rest is in the JSON

_OUT = re.compile(r" --out[ =]\S+")  # where the reports were written to says nothing of them

_HEAD = """# Results

Made by `gru-memory eval results` from what the commands below wrote; nothing here is typed by hand. What each evaluation does is
in [evaluation.md](evaluation.md). Figures are means over the seeds, ± the standard deviation between them.
"""


def results_page(folder: str | Path, page: str | Path) -> list[str]:
    """Write the page, and the pictures into a folder of its name beside it.

    A section of an evaluation that the folder has no report of stays as an earlier call wrote it, with the commit and the
    machine it came from.

    Args:
        folder: what `--out` of the evaluations was; files that are no reports of them are left out.
        page: the Markdown file.

    Returns:
        names of the evaluations in the folder with fewer than three seeds.

    Raises:
        FileNotFoundError: the folder holds no report of an evaluation.
    """
    folder, page = Path(folder), Path(page)
    known: dict[str, Columns] = {RECALL.name: RECALL, **EVALUATIONS}
    found = {name: report for name in known if (report := _read(folder / f"{name}.json", name)) is not None}
    if not found:
        raise FileNotFoundError(f"no report of an evaluation in {folder}: run some first, such as gru-memory eval grid")
    sections, few = _sections_of(page), []
    for name, report in found.items():
        runs = recall_runs(report["results"]) if name == RECALL.name else report["results"]
        if len({run["config"]["seed"] for run in runs}) < SEEDS:
            few.append(name)
        sections[name] = _section(known[name], report, runs, _picture(folder, page, known[name]))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([_HEAD, *(sections[name] for name in known if name in sections)]), encoding="utf-8")
    return few


def _sections_of(page: Path) -> dict[str, str]:
    """The sections of the page as it is, by the evaluation each is of."""
    if not page.is_file():
        return {}
    parts = re.split(r"^## (?=\S+$)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.split("\n", 1)[0]: f"## {part.strip()}\n" for part in parts}


def _read(path: Path, name: str) -> dict[str, Any] | None:
    """A report of the evaluation `name`; None if there is none."""
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): run gru-memory eval {name} again") from error
    return report if isinstance(report, dict) and report.get("evaluation") == name and report.get("results") else None


def _section(evaluation: Columns, report: dict[str, Any], runs: Sequence[dict[str, Any]], picture: str | None) -> str:
    headings, cells = table(runs, evaluation)
    aligned = ["---" if number < len(evaluation.labels) else "---:" for number in range(len(headings))]
    lines = [headings, aligned, *cells[:LONGEST]]
    text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    if len(cells) > LONGEST:
        text += f"\n\n{len(cells) - LONGEST} more lines are in the JSON."
    drawn = f"\n![{evaluation.name}]({picture})\n" if picture else ""
    return f"## {evaluation.name}\n\n{evaluation.about}\n\n{_origin(report, runs)}\n\n{text}\n{drawn}"


def _origin(report: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Command, model, memory, seeds, commit, machine and time."""
    about, memory = report["environment"], report.get("memory", {})
    seeds = list(dict.fromkeys(run["config"]["seed"] for run in runs))
    enough = "" if len(seeds) >= SEEDS else f", fewer than {SEEDS}: the spread is not known"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return "\n".join(
        (
            f"    {_named(_OUT.sub('', report['command']))}",
            "",
            _named(f"- model {report.get('model', 'unknown')}, memory {memory.get('from', 'unknown')}{_short(memory)}"),
            f"- seeds {', '.join(map(str, seeds))} ({len(seeds)}{enough})",
            f"- commit {about.get('commit') or 'unknown'}; {versions}; Python {about['python']}",
            f"- {_on(report)}{about['cpu']}, {about['cores']} cores, {about['threads']} threads; "
            f"{sum(run['seconds'] for run in runs):,.0f} s",
        )
    )


def _on(report: dict[str, Any]) -> str:
    """What the model ran on, where it was not the processor."""
    return f"{report['device']}; " if report.get("device", "cpu") != "cpu" else ""


def _named(text: str) -> str:
    """Absolute paths by their last part: where something lies on the machine that measured says nothing to others."""
    return re.sub(r"(?<![^\s=,'\"])/(?:[^\s,'\"/]+/)+(?=[^\s,'\"/])", "", text)


def _short(memory: dict[str, Any]) -> str:
    """The first digits of a fingerprint; memories that an evaluation trained and dropped have none."""
    return f" (`{memory['fingerprint'][:12]}`)" if memory.get("fingerprint") else ""


def _picture(folder: Path, page: Path, evaluation: Columns) -> str | None:
    """Copy the picture to where the page can show it, and say where that is; pages of their own are too large."""
    source = folder / f"{evaluation.name}{evaluation.suffix}"
    if evaluation.suffix != ".png" or not source.is_file():
        return None
    target = page.parent / page.stem / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return f"{page.stem}/{source.name}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
