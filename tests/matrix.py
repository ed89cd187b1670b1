"""The compatibility matrix: what is checked (a feature is a check) on every family of models.

    python tests/matrix.py          # runs every cell, then writes docs/compatibility.md (make compatibility)

test_matrix.py runs the same cells one by one. To add a feature, declare a `Feature` in FEATURES.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from decoding import OFTEN, assert_state_after, some_state
from families import CONFIGS
from test_generation import STRATEGIES, test_beams_carry_their_own_memory, test_state_after_generate
from test_invariants import (
    assert_same_gradients,
    gradients,
    loss_of,
    padded,
    test_an_all_padding_row_keeps_its_state,
    test_gradients_flow_through_the_state,
    test_only_the_memory_learns,
    test_other_rows_change_nothing,
    test_packed_turns_are_separate_calls,
    test_padding_changes_nothing,
    test_whole_is_chunks_is_tokens,
)
from tiny import SumSite, assert_close, assert_same_state, base_model, memory_model, random_ids, tolerance_of, wake
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from gru_memory import AutoModelWithGRUMemory, MemoryConfig, MemoryState, add_memory, backbones, check_backbone

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"

# Exact arithmetic shows small mistakes, but some models compute in float32 whatever their weights are in.
SINGLE = {
    "gemma2": "its attention's softmax is in float32, where the mask of a float64 model is minus infinity",
    "gemma3_text": "the scale of its embeddings is float32, and loading keeps it so",
    "mixtral": "its experts' product takes no float64",
}
PARTLY_SINGLE = {"gpt_neo": "attention in float32", "gptj": "attention in float32"}


@dataclass(frozen=True)
class Row:
    """A family of models, or a variant of one."""

    name: str

    @property
    def family(self) -> str:
        return self.name.split(",")[0]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.family in SINGLE else torch.float64

    @property
    def tolerance(self) -> float:
        if self.family in SINGLE:
            return 1e-3
        return 2e-5 if self.family in PARTLY_SINGLE else 1e-9

    def base(self) -> PreTrainedModel:
        return base_model(self.name).to(self.dtype)

    def fresh(self, **config) -> PreTrainedModel:
        """A model with an open memory at three sites, for a check that changes it."""
        return memory_model(self.name, **{"cell": "mingru", "decay_every": "turn", **config}).to(self.dtype)

    def model(self) -> PreTrainedModel:
        """The same for checks that leave its weights alone."""
        model = _shared(self)
        model.memory_state = None
        return model


@functools.cache
def _shared(row: Row) -> PreTrainedModel:
    return row.fresh()


@dataclass(frozen=True)
class Refusal:
    """A cell that is an error: what the message holds, and why, in the words of the document."""

    message: str
    reason: str


@dataclass(frozen=True)
class Feature:
    """A column: `check(row)` raises AssertionError where the feature does not work.

    Args:
        name: head of the column.
        says: what is checked, for the document.
        check: on one row; for a refused row it must raise a ValueError with the refusal's message.
        refused: by row or family.
    """

    name: str
    says: str
    check: Callable[[Row], None]
    refused: dict[str, Refusal] = field(default_factory=dict)

    def refusal(self, row: Row) -> Refusal | None:
        return self.refused.get(row.name) or self.refused.get(row.family)


def run_cell(row: Row, feature: Feature) -> None:
    """Raise AssertionError unless the cell is what the document says."""
    refusal = feature.refusal(row)
    with tolerance_of(row.tolerance):
        if refusal is None:
            feature.check(row)
            return
        try:
            feature.check(row)
        except ValueError as error:
            assert refusal.message in str(error), error
            return
    raise AssertionError(f"{row.name} x {feature.name} is not refused")


# The checks


def parts(row: Row) -> None:
    check_backbone(row.base())
    check_backbone(row.model())
    for seen in _read_by(row):
        assert torch.equal(*seen)


def _read_by(row: Row) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each site reads, and what is there in the base model."""
    base, ids, seen, wanted = row.base(), random_ids(), {}, {}
    model = row.fresh(sites=("input", "layer:0", "middle", "top"), gate_init=0.0)
    for site, module in model.memory_sites().items():
        with torch.no_grad():
            module.gate.zero_()
        module.register_forward_pre_hook(lambda module, args, site=site: seen.update({site: args[0]}))
    blocks = backbones.blocks_of(base)
    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: wanted.update(input=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for site, index in (("layer:0", 0), ("middle", len(blocks) // 2)):
        blocks[index].register_forward_hook(
            lambda module, args, output, site=site: wanted.update({site: backbones.hidden_states_in(output)})
        )
    base.get_output_embeddings().register_forward_pre_hook(lambda module, args: wanted.update(top=args[0]))
    assert torch.equal(base(ids).logits, model(ids).logits)
    return [(seen[site], wanted[site]) for site in ("input", "layer:0", "middle", "top")]


def chunks(row: Row) -> None:
    for sizes in ([7, 1, 12], [1] * 20):
        test_whole_is_chunks_is_tokens(row.model(), sizes)


def packed_turns(row: Row) -> None:
    test_packed_turns_are_separate_calls(row.model())


def padding(row: Row) -> None:
    for side in ("left", "right"):
        test_padding_changes_nothing(row.model(), side)
    test_other_rows_change_nothing(row.model())
    test_an_all_padding_row_keeps_its_state(row.model())


def embeddings(row: Row) -> None:
    """As a prompt of embeddings. What is stored comes from the head, so they must be tied; else hidden states alone are."""
    model, ids = row.model(), random_ids()
    start = some_state(model)
    wanted = model(ids, memory_state=start, use_cache=False)
    got = model(inputs_embeds=model.get_input_embeddings()(ids), memory_state=start, use_cache=False)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied:
        assert_close(got.logits, wanted.logits)
        assert_same_state(got.memory_state, wanted.memory_state)
    else:
        assert got.memory_state.is_finite()
        assert got.memory_state.tokens.tolist() == wanted.memory_state.tokens.tolist()
        assert (got.logits - wanted.logits).abs().max() > 1e-3


def generation(row: Row) -> None:
    for strategy in ("greedy", "sampling", "several sequences"):
        row.model()
        test_state_after_generate(row.model(), strategy)


def beams(row: Row) -> None:
    test_state_after_generate(row.model(), "several beams")
    test_beams_carry_their_own_memory(row.model(), "beams")


def untouched(row: Row) -> None:
    """A closed gate and a disabled memory are the base model, bit for bit."""
    ids = random_ids()
    inputs = {"input_ids": ids, "attention_mask": padded(ids)["attention_mask"]}
    inputs["attention_mask"][0, :4] = 0
    settings = {"max_new_tokens": 4, "do_sample": False}
    base = row.base()
    wanted, text = base(**inputs).logits, base.generate(**inputs, **settings)
    # Rows of padding alone may hold NaN in the base model; they are the same then, too.
    silent = add_memory(base, MemoryConfig(sites=("input", "middle", "top"), num_heads=2, num_slots=4, slot_size=8))
    model = row.model()
    model.memory_state = before = some_state(model)
    with model.disable_memory():
        for quiet in (silent, model):
            assert torch.equal(quiet(**inputs).logits, wanted)
            assert torch.equal(quiet.generate(**inputs, **settings), text)
    assert model.memory_state is before
    assert torch.equal(silent(**inputs).logits, wanted)
    assert torch.equal(silent.generate(**inputs, **settings), text)
    assert not torch.equal(model(**inputs).logits, wanted)


def learning(row: Row) -> None:
    model = row.model()
    test_only_the_memory_learns(model)
    test_gradients_flow_through_the_state(model)
    model.zero_grad()


def checkpointing(row: Row) -> None:
    """Recomputed blocks give the gradients of blocks that were not. Only the top site before transformers 5.23."""
    old = "__call__" in GradientCheckpointingLayer.__dict__
    sites = ("top",) if old else ("input", "middle", "top")
    model, ids = row.fresh(sites=sites).train(), random_ids()
    start = some_state(model).detach()
    wanted = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    if old and backbones.before_head_of(model) is backbones.blocks_of(model)[-1]:  # the top site is hooked to a block
        with pytest.raises(RuntimeError, match="5.23"):
            model(ids, use_cache=False)
        return
    got = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    assert_same_gradients(got, wanted, row.tolerance)


def saving(row: Row) -> None:
    """The whole model, the memory alone, and a state."""
    model, ids = row.model(), random_ids()
    start = some_state(model)
    wanted = model(ids, memory_state=start, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        whole, memory, state = (Path(folder, name) for name in ("whole", "memory", "state"))
        model.save_pretrained(whole)
        model.save_memory(memory)
        start.save(state)
        start = MemoryState.load(state, model.memory_fingerprint())
        loaded = AutoModelWithGRUMemory.from_pretrained(whole, dtype=row.dtype)
        plain = AutoModelForCausalLM.from_pretrained(whole, dtype=row.dtype).eval()
        other = add_memory(row.base())
        other.load_memory(memory)
    assert type(loaded) is type(model)
    for again in (loaded, other):
        assert torch.equal(again(ids, memory_state=start, use_cache=False).logits, wanted)
        assert again.memory_fingerprint() == model.memory_fingerprint()
    with model.disable_memory():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def own_site(row: Row) -> None:
    """A module of somebody's own in the middle: chunks, generate() and gradients."""
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    model, ids = wake(add_memory(row.base(), config, {"middle": SumSite()})).to(row.dtype), random_ids()
    whole = model(ids, use_cache=False)
    one = model(ids[:, :7], use_cache=True)
    two = model(ids[:, 7:], past_key_values=one.past_key_values)
    assert_close(torch.cat([one.logits, two.logits], 1), whole.logits)
    assert_same_state(two.memory_state, whole.memory_state)
    sequences = model.generate(ids, max_new_tokens=4, eos_token_id=OFTEN, **STRATEGIES["beams"])
    assert_state_after(model, model.memory_state, sequences, ids)
    assert gradients(model, loss_of(whole.logits))["gru_memory.middle.scale"].abs().max() > 0


def meta_device(row: Row) -> None:
    """Shapes of logits and state, without numbers."""
    ids = random_ids()
    model = row.fresh().to(torch.bfloat16)  # all that torch's product of Mixtral's experts knows there
    wanted = model(ids, use_cache=False)
    model, ids = model.to("meta"), ids.to("meta")
    # transformers looks at numbers where padding could be, or several turns in one row: not so with a cache and this
    model.config.pad_token_id = None
    model.set_attn_implementation("eager")
    output = model(ids, use_cache=True)
    assert output.logits.shape == wanted.logits.shape
    for site, kept in wanted.memory_state.sites.items():
        assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {
            k: (v.shape, v.dtype) for k, v in output.memory_state.sites[site].items()
        }
    with torch.device("meta"):
        bare = add_memory(AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert bare(ids).logits.shape == wanted.logits.shape


def half_precision(row: Row) -> None:
    exact, model, ids = row.model(), row.fresh().to(torch.bfloat16), random_ids()
    output = model(ids)
    assert output.logits.dtype == torch.bfloat16
    assert output.memory_state.sites["top"]["slots"].dtype == torch.float32
    assert (output.logits.double() - exact(ids).logits.double()).abs().mean() < 0.5
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.memory_state.is_finite()


def static_cache(row: Row) -> None:
    model, ids = row.model(), random_ids()
    settings = {"max_new_tokens": 5, "do_sample": False, "memory_state": some_state(model)}
    settings |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    settings["attention_mask"][0, :5] = 0
    wanted = model.generate(ids, **settings)
    got = model.generate(ids, cache_implementation="static", **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


_ATTENTION_SEES_ALL = Refusal(
    "does not keep attention to one turn",
    "its attention in transformers does not see where positions restart, and would look across turns: pass the turns one "
    "after the other",
)

_NO_STATIC_CACHE = Refusal(
    "something else with a static cache",
    "transformers computes something else for it with a static cache than with a growing one, or fails",
)

FEATURES = [
    Feature(
        "parts",
        "Blocks run in order, each on what the one before returned; the head reads the last site unchanged; every site "
        "reads what it names.",
        parts,
    ),
    Feature(
        "chunks", "A whole sequence, any chunks of it, and one token at a time give the same logits and state.", chunks
    ),
    Feature(
        "packed turns",
        "A row of turns whose positions restart equals the turns one after the other.",
        packed_turns,
        refused={"opt": _ATTENTION_SEES_ALL, "falcon": _ATTENTION_SEES_ALL},
    ),
    Feature("padding", "Left and right padding, and the other rows of a batch, change nothing.", padding),
    Feature(
        "embeddings",
        "`inputs_embeds` instead of ids: the same, where input embeddings and head are tied; else the memory stores by hidden "
        "states alone.",
        embeddings,
    ),
    Feature(
        "generate",
        "After greedy decoding and sampling, with rows that end early and `num_return_sequences`, the state is that of one pass "
        "over what was returned.",
        generation,
    ),
    Feature("beams", "The same for beams, which carry their own memory when they are reordered.", beams),
    Feature(
        "static cache",
        "The text and the state with a static cache are those with a growing one.",
        static_cache,
        refused={"gpt_neo": _NO_STATIC_CACHE, "falcon, alibi": _NO_STATIC_CACHE},
    ),
    Feature(
        "closed gate",
        "With the gate at 0, and under `disable_memory()`, the model is the base model bit for bit.",
        untouched,
    ),
    Feature("gradients", "Only the memory gets gradients, and they reach back through the state.", learning),
    Feature(
        "checkpointing",
        'Gradient checkpointing gives the same gradients (before transformers 5.23 for `sites=("top",)` only).',
        checkpointing,
    ),
    Feature("saving", "The whole model, the memory alone and a state, saved and loaded: the same logits.", saving),
    Feature("own site", "A module of a user's own as a site: chunks, beams and gradients.", own_site),
    Feature("meta", "A forward pass on the meta device gives the shapes of logits and state.", meta_device),
    Feature("bfloat16", "A model in bfloat16 keeps its slots in float32, and generates.", half_precision),
]
ROWS = [Row(name) for name in CONFIGS]


# The document


def render() -> str:
    """docs/compatibility.md."""
    reasons: list[str] = []
    table = [["", *(feature.name for feature in FEATURES)]]
    for row in ROWS:
        cells = [row.name]
        for feature in FEATURES:
            refusal = feature.refusal(row)
            if refusal is not None and refusal.reason not in reasons:
                reasons.append(refusal.reason)
            cells.append("yes" if refusal is None else f"no ({reasons.index(refusal.reason) + 1})")
        table.append(cells)
    notes = [f"{number}. Refused: {reason}." for number, reason in enumerate(reasons, 1)]
    single = [f"`{family}` ({reason})" for family, reason in SINGLE.items()]
    return "\n".join(
        [
            "# Compatibility",
            "",
            "Written by `make compatibility`, which runs every cell first; `tests/test_matrix.py` runs them all again, one by one,",
            "on tiny models with random weights. *yes* is tested; *no* is an error that says so, and that is tested too.",
            "",
            *_table(table),
            "",
            *notes,
            "",
            "## What is checked",
            "",
            *_table([["", "check"], *([feature.name, feature.says] for feature in FEATURES)]),
            "",
            f"Models run in float64, but in float32 for {' and '.join(single)}.",
            "",
            "## Where memory hooks in",
            "",
            "`blocks` is what the sites `input`, `middle` and `layer:K` belong to. `top` is the output of the last module",
            "before the head.",
            "[backbones.md](backbones.md) shows how to add a family.",
            "",
            *_table([["model_type", "blocks", "before the head", "input embeddings"], *_backbone_rows()]),
            "",
        ]
    )


def _backbone_rows() -> list[list[str]]:
    rows = []
    for family in sorted({row.family for row in ROWS}):
        row = backbones._BACKBONES[family]
        last = f"`{row.final_norm}`" + (
            f", then `{row.projection}`, where the model has them" if row.projection else ""
        )
        rows.append([family, f"`{row.blocks}`", last, f"times `{row.embed_scale}`" if row.embed_scale else ""])
    return rows


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
