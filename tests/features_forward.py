"""What is checked of the forward pass on every family."""

import torch
from cells import Feature, Refusal, Row
from decoding import OFTEN, assert_state_after, some_state
from test_generation import STRATEGIES
from test_invariants_forward import (
    test_an_all_padding_row_keeps_its_state,
    test_other_rows_change_nothing,
    test_packed_turns_are_separate_calls,
    test_padding_changes_nothing,
    test_whole_is_chunks_is_tokens,
)
from tiny import SumSite, assert_close, assert_same_state, gradients, loss_of, padded, random_ids, wake
from transformers import AutoModelForCausalLM

from gru_memory import MemoryConfig, add_memory, backbones, check_backbone


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
    exact, ids = row.model(), random_ids()
    wanted = exact(ids).logits.double()
    for dtype, tolerance in ((torch.bfloat16, 0.5), (torch.float16, 0.1)):
        model = row.fresh().to(dtype)
        output = model(ids)
        assert output.logits.dtype == dtype
        assert output.memory_state.sites["top"]["slots"].dtype == torch.float32
        assert (output.logits.double() - wanted).abs().mean() < tolerance
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert model.memory_state.is_finite()


_ATTENTION_SEES_ALL = Refusal(
    "does not keep attention to one turn",
    "its attention in transformers does not see where positions restart, and would look across turns: pass the turns one "
    "after the other",
)

FEATURES = [
    Feature(
        "parts",
        "Blocks run in order, each on what the one before returned; the head reads the last site unchanged; every site "
        "reads what it names.",
        parts,
    ),
    Feature(
        "chunks",
        "A whole sequence, any chunks of it, and one token at a time give the same logits and state.",
        chunks,
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
        "closed gate",
        "With the gate at 0, and under `disable_memory()`, the model is the base model bit for bit.",
        untouched,
    ),
    Feature("own site", "A module of a user's own as a site: chunks, beams and gradients.", own_site),
    Feature(
        "half precision",
        "A model in bfloat16 or float16 keeps its slots in float32, comes near the exact one, and generates.",
        half_precision,
    ),
    Feature("meta", "A forward pass on the meta device gives the shapes of logits and state.", meta_device),
]
