"""The compatibility matrix: every feature on every family of models.

    python tests/matrix.py          # runs every cell, then writes docs/compatibility.md (make compatibility)

test_matrix.py runs the same cells one by one. To add a feature, declare a `Feature` in one of the lists below.
"""

from __future__ import annotations

import sys
from pathlib import Path

import features_forward
import features_generation
import features_training
import torch
from cells import ROWS, SINGLE, Feature, run_cell
from tiny import base_model, random_ids
from transformers.utils import logging

from gru_memory import backbones

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
GROUPS = {
    "The forward pass": features_forward.FEATURES,
    "generate()": features_generation.FEATURES,
    "Training and files": features_training.FEATURES,
}
FEATURES = [feature for features in GROUPS.values() for feature in features]


def render() -> str:
    """docs/compatibility.md."""
    lines = [
        "# Compatibility",
        "",
        "Written by `make compatibility`, which runs every cell first; `tests/test_matrix.py` runs them all again, one by one,",
        "on tiny models with random weights. *yes* is tested; *no* is an error that says so, and that is tested too.",
        "[backbones.md](backbones.md) shows how to add a family.",
        "",
    ]
    reasons: list[str] = []
    for group, features in GROUPS.items():
        lines += [
            f"## {group}",
            "",
            *_table([["", *(feature.name for feature in features)], *_cells(features, reasons)]),
        ]
        lines += ["", *_table([["", "what is checked"], *([feature.name, feature.says] for feature in features)]), ""]
    single = [f"`{family}` ({reason})" for family, reason in SINGLE.items()]
    lines += [
        "## What is refused, and why",
        "",
        *(f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)),
        "",
        f"Models run in float64, but in float32: {'; '.join(single)}.",
        "",
        "## Where memory hooks in",
        "",
        "`blocks` is what the sites `input`, `middle` and `layer:K` belong to. `top` is the output of the last",
        "module before the head. What is memorised of a token is its row of the head; what happens to logits after the head",
        "happens to what memory adds as well.",
        "",
        *_table(
            [["model_type", "blocks", "before the head", "head", "its logits", "input embeddings"], *_backbone_rows()]
        ),
        "",
    ]
    return "\n".join(lines)


def _cells(features: list[Feature], reasons: list[str]) -> list[list[str]]:
    """A line a row; `reasons` numbers the refusals, and grows."""
    lines = []
    for row in ROWS:
        refusals = [feature.refusal(row) for feature in features]
        reasons += dict.fromkeys(r.reason for r in refusals if r is not None and r.reason not in reasons)
        lines.append([row.name, *("yes" if r is None else f"no ({reasons.index(r.reason) + 1})" for r in refusals)])
    return lines


def _backbone_rows() -> list[list[str]]:
    rows = []
    for family in sorted({row.family for row in ROWS}):
        row = backbones._BACKBONES[family]
        last = f"`{row.final_norm}`" + (
            f", then `{row.projection}`, where the model has them" if row.projection else ""
        )
        scale = f"times `{row.embed_scale}`" if row.embed_scale else ""
        rows.append([family, f"`{row.blocks}`", last, *_head_of(family), scale])
    return rows


@torch.no_grad()
def _head_of(family: str) -> list[str]:
    """Where the head of a family is, and what becomes of the logits that it makes: seen on its tiny model."""
    model, ids, seen = base_model(family), random_ids(), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(ids).logits
    plain = torch.nn.functional.linear(seen[0], head.weight, head.bias)
    changes = [] if head.bias is None else ["a bias is added"]
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        plain = cap * torch.tanh(plain / cap)
        changes.append("capped by `config.final_logit_softcapping`")
    torch.testing.assert_close(logits, plain)
    path = next(name for name, module in model.named_modules() if module is head)
    return [f"`{path}`", ", ".join(changes)]


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [_line(head), _line(["---"] * len(head)), *map(_line, body)]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run every cell; write the document if all are as it says."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = 0
    for row in ROWS:
        for feature in FEATURES:
            try:
                run_cell(row, feature)
            except Exception as error:  # every cell is to be reported
                failed += 1
                print(
                    f"{row.name} x {feature.name}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                )
    if failed:
        print(f"{failed} of {len(ROWS) * len(FEATURES)} cells failed: {DOCUMENT.name} is unchanged")
        return 1
    DOCUMENT.write_text(render(), encoding="utf-8")
    print(f"{len(ROWS) * len(FEATURES)} cells, {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
