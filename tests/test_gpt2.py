"""GPT-2 with a memory: the short import path, the example of the README, and all four sizes."""

import math

import pytest
import torch
from tiny import EOS, HIDDEN, LAYERS, PAD, base_model, one_thread, random_ids  # noqa: F401 (one is a fixture)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import gru_memory
from gpt2_gru_memory import GPT2WithGRUMemory, GRUMemoryWithDecay

SIZES = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}
SITES = ("input", "middle", "top")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that holds a tiny GPT-2 without a memory."""
    base_model("gpt2").save_pretrained(tmp_path)
    return tmp_path


def on_meta(size):
    """A model of this size without its numbers."""
    with torch.device("meta"):
        return GPT2WithGRUMemory(GPT2Config(**SIZES[size]))


def with_numbers(model, dtype):
    """Small random numbers in every weight, the same ones over and over: drawing a billion takes too long."""
    model = model.to(dtype).to_empty(device="cpu")
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
    model.tie_weights()
    return model.eval()


def assert_untrained(model):
    """Every site starts as its own initialisation says, whatever the base model's rule is."""
    assert tuple(model.memory_sites()) == SITES
    for site in model.memory_sites().values():
        assert isinstance(site, GRUMemoryWithDecay)
        assert site.gate.item() == pytest.approx(site.gate_init, rel=1e-2)
        assert site.gate_init > 0  # it is to be heard before it is trained
        assert torch.equal(site.output.weight, site.value_embed.weight.t())
        assert torch.equal(site.query.weight, site.key.weight)
        assert site.key.weight.std().item() == pytest.approx(2 / math.sqrt(site.key.in_features), rel=0.2)
        assert not site.value_hidden.weight.any()
        assert not site.key.bias.any()
        d = site.slot_size
        assert torch.allclose(site.weight_ih[:, 2 * d :].diagonal(dim1=1, dim2=2).mean(), torch.tensor(1.0), atol=0.05)
        assert (site.bias_ih[:, d : 2 * d] == -2).all()


def test_the_short_import_path_names_the_same_classes():
    assert GPT2WithGRUMemory is gru_memory.GPT2WithGRUMemory
    assert GRUMemoryWithDecay is gru_memory.GRUMemoryWithDecay
    assert issubclass(GPT2WithGRUMemory, GPT2LMHeadModel)


def test_the_example_of_the_readme(checkpoint):
    model = GPT2WithGRUMemory.from_pretrained_with_memory(checkpoint, decay=0.97)
    assert isinstance(model, GPT2LMHeadModel)
    assert model.memory_config.decay == 0.97
    assert_untrained(model)
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 50}
    settings |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "max_new_tokens": 12}
    model.reset(batch_size=1)
    lengths = [0]
    for turn in range(3):
        torch.manual_seed(turn)
        sequences = model.generate(random_ids(1, 5, seed=turn), **settings)
        lengths.append(lengths[-1] + sequences.shape[1])
        assert model.memory_state.tokens.item() == lengths[-1]
        assert model.memory_state.turns.item() == turn + 1
    model.reset(batch_size=1)
    assert model.memory_state.tokens.item() == 0


def test_an_untrained_memory_is_heard(checkpoint):
    """What came before changes what comes after, by a little."""
    model = GPT2WithGRUMemory.from_pretrained_with_memory(checkpoint, decay=0.97).eval()
    ids = random_ids(1)
    before = model(random_ids(1, 30, seed=5)).memory_state
    change = (model(ids, memory_state=before).logits - model(ids).logits).abs().max()
    assert 1e-3 < change < 5


def test_settings_of_the_memory_and_of_the_model_are_told_apart(checkpoint):
    model = GPT2WithGRUMemory.from_pretrained_with_memory(
        checkpoint, decay=[0.9, 0.99], num_heads=2, sites=("top",), cell="mingru", dtype=torch.bfloat16
    )
    assert model.dtype == model.memory_sites()["top"].gate.dtype == torch.bfloat16
    assert (model.memory_config.num_heads, model.memory_config.cell) == (2, "mingru")
    with pytest.raises(ValueError, match="decay"):
        GPT2WithGRUMemory.from_pretrained_with_memory("this folder is not even opened", decay=1.5)


def test_a_checkpoint_without_a_memory_is_given_an_untrained_one(checkpoint):
    model = GPT2WithGRUMemory.from_pretrained(checkpoint)
    assert type(model) is GPT2WithGRUMemory
    assert_untrained(model)
    with model.disable_memory():
        assert torch.equal(model(random_ids()).logits, base_model("gpt2")(random_ids()).logits)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"gru_memory"}


def test_a_model_from_its_config(tmp_path):
    config = GPT2Config(vocab_size=101, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, eos_token_id=EOS, pad_token_id=PAD)
    model = GPT2WithGRUMemory(config).eval()
    assert_untrained(model)
    assert not torch.equal(model.transformer.wte.weight, torch.zeros_like(model.transformer.wte.weight))
    model.save_pretrained(tmp_path)
    loaded = GPT2WithGRUMemory.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GPT2LMHeadModel)


def test_weights_missing_from_a_checkpoint_start_as_the_memory_says(checkpoint):
    """transformers fills in what a checkpoint lacks by the base model's rule; the memory has its own."""
    config = GPT2Config.from_pretrained(checkpoint)
    config.gru_memory = {"sites": list(SITES), "gate_init": 0.3}
    model = GPT2WithGRUMemory.from_pretrained(checkpoint, config=config)
    assert_untrained(model)
    with torch.no_grad():
        model.memory_sites()["top"].gate.fill_(0.7)
    model.init_weights()
    assert model.memory_sites()["top"].gate.item() == pytest.approx(0.7)


def test_a_memory_that_is_there_is_not_initialised_again():
    model = GPT2WithGRUMemory(GPT2Config(vocab_size=101, n_embd=HIDDEN, n_layer=LAYERS, n_head=4))
    model.init_weights()
    assert_untrained(model)
    with torch.no_grad():
        model.memory_sites()["top"].gate.fill_(0.7)
    model.init_weights()
    assert model.memory_sites()["top"].gate.item() == pytest.approx(0.7)


def test_other_classes_take_a_tiny_checkpoint_too(checkpoint):
    model = gru_memory.AutoModelWithGRUMemory.from_pretrained_with_memory(checkpoint, decay=0.5)
    assert type(model) is GPT2WithGRUMemory
    assert_untrained(model)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_sites_where_they_belong(size):
    model = on_meta(size)
    layers, width = SIZES[size]["n_layer"], SIZES[size]["n_embd"]
    heads, slots, floats = (getattr(model.memory_config, n) for n in ("num_heads", "num_slots", "slot_size"))
    assert tuple(model.memory_sites()) == SITES
    for site in model.memory_sites().values():
        assert site.key.weight.shape == (heads * slots, site.key.in_features)
        assert site.key.in_features >= width
        assert site.value_embed.weight.shape == (heads * floats, width)
        assert site.output.weight.shape == (width, heads * floats)
        assert site.initial_state(2)["slots"].shape == (2, heads, slots, floats)
    output = model(torch.zeros(2, 3, dtype=torch.long, device="meta"))  # shapes alone are computed there
    assert output.logits.shape == (2, 3, model.config.vocab_size)
    assert all(kept["slots"].shape == (2, heads, slots, floats) for kept in output.memory_state.sites.values())
    for site in model.memory_sites().values():
        site.to_empty(device="cpu").reset_parameters()
        y, state = site(torch.randn(1, 3, width), torch.randn(1, 3, width))
        assert y.shape == (1, 3, width)
        assert torch.isfinite(y).all()
        assert state["slots"].shape == (1, heads, slots, floats)
    hooked = [index for index, block in enumerate(model.transformer.h) if block._forward_hooks]
    assert hooked == [layers // 2]
    assert [index for index, block in enumerate(model.transformer.h) if block._forward_pre_hooks] == [0]
    assert len(model.transformer.ln_f._forward_hooks) == 1


def generates(size, dtype, new_tokens):
    model = with_numbers(on_meta(size), dtype)
    prompt = torch.tensor([[464, 3290, 318]])
    model.reset(batch_size=1)
    sequences = model.generate(
        prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=50256
    )
    assert sequences.shape == (1, 3 + new_tokens)
    assert model.memory_state.tokens.item() == 3 + new_tokens
    assert model.memory_state.is_finite()
    assert all(kept["slots"].abs().max() > 0 for kept in model.memory_state.sites.values())


def test_gpt2_generates():
    generates("gpt2", torch.float32, 3)


@pytest.mark.slow
def test_gpt2_xl_generates():
    generates("gpt2-xl", torch.bfloat16, 2)
