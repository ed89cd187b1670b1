"""The table of families: what is refused, and how a further one is taught."""

import re

import pytest
import torch
from families import HIDDEN, PAD, VOCABULARY
from tiny import base_model, one_thread, random_ids, wake  # noqa: F401 (a fixture)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Model,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gru_memory import Backbone, MemoryConfig, add_memory, backbones, check_backbone, register_backbone

BLOOM = Backbone(blocks="transformer.h", final_norm="transformer.ln_f")


@pytest.fixture
def table(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(backbones, "_BACKBONES", dict(backbones._BACKBONES))


def bloom():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4, pad_token_id=PAD)
    return BloomForCausalLM(config).eval()


def test_an_unknown_family_shows_the_call_that_registers_it(table):
    model = bloom()
    with pytest.raises(ValueError, match="model_type 'bloom'") as caught:
        add_memory(model)
    assert type(model) is BloomForCausalLM
    call = re.search(r"(gru_memory\.register_backbone\(.*?\)\))", str(caught.value)).group(1)
    call = call.replace("path.to.layers", BLOOM.blocks).replace("path.to.norm", BLOOM.final_norm)
    import gru_memory

    exec(call, {"gru_memory": gru_memory})
    check_backbone(model)
    ids = random_ids()
    wanted = model(ids).logits
    model = add_memory(model, MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8))
    assert torch.equal(model(ids).logits, wanted)
    one = wake(model)(ids[:, :9], use_cache=True)
    two = model(ids[:, 9:], past_key_values=one.past_key_values)
    torch.testing.assert_close(two.logits, model(ids, use_cache=False).logits[:, 9:], rtol=1e-4, atol=1e-4)


def test_the_page_on_families(table, repository, capsys):
    page = (repository / "docs" / "backbones.md").read_text(encoding="utf-8")
    names = {"model": bloom()}
    for code in re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert "BloomForCausalLM" in capsys.readouterr().out
    assert names["model"].generate(random_ids(), max_new_tokens=2).shape == (2, 22)


def test_an_encoder_decoder_is_refused_whatever_is_registered(table):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    register_backbone("t5", Backbone(blocks="decoder.block", final_norm="decoder.final_layer_norm"))
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model: memory needs a causal"):
        add_memory(model)
    assert type(model) is T5ForConditionalGeneration


def test_a_model_without_a_head_is_refused():
    model = GPT2Model(base_model("gpt2").config)
    with pytest.raises(ValueError, match="no language-model head"):
        backbones.backbone_of(model)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Backbone(blocks="model.blocks", final_norm="model.norm"), "no 'model.blocks'"),
        (Backbone(blocks="model.layers", final_norm="norm"), "no 'norm'"),
        (Backbone(blocks="model.layers", final_norm="model.norm", projection="model.out"), "no 'model.out'"),
    ],
)
def test_paths_that_do_not_exist_are_refused(table, backbone, message):
    register_backbone("llama", backbone)
    model = base_model("llama")
    with pytest.raises(ValueError, match=message):
        add_memory(model)
    assert type(model) is LlamaForCausalLM
    with pytest.raises(ValueError, match=message):
        check_backbone(model)


@pytest.mark.parametrize(
    ("family", "backbone", "message"),
    [
        (
            "llama",
            Backbone(blocks="model.layers", final_norm="model.embed_tokens"),
            "does not read what model.embed_tokens",
        ),
        ("llama", Backbone(blocks="model.longer", final_norm="model.norm"), "once each"),
        ("llama", Backbone(blocks="model.reversed", final_norm="model.norm"), "in order"),
        ("llama", Backbone(blocks="model.norms", final_norm="model.norm"), "does not read what block 0 returned"),
        ("llama", Backbone(blocks="model.layers", final_norm="model.unused"), "does not run"),
        (
            "opt, projected",
            Backbone(blocks="model.decoder.layers", final_norm="model.decoder.layers.3"),
            "as projection",
        ),
    ],
)
def test_a_row_that_does_not_describe_the_model_is_found_out(table, family, backbone, message):
    model = base_model(family)
    check_backbone(model)
    if family == "llama":
        layers = model.model.layers
        model.model.reversed = list(layers[::-1])
        model.model.longer = [*layers, torch.nn.Identity()]
        model.model.norms = [layer.input_layernorm for layer in layers]
        model.model.unused = torch.nn.Identity()
    register_backbone(model.config.model_type, backbone)
    with pytest.raises(ValueError, match=message):
        check_backbone(model)
    hooks = [*model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooks)


def test_the_top_site_of_a_projected_model_is_as_wide_as_its_head():
    model = add_memory(base_model("opt, projected"), MemoryConfig(sites=("middle", "top"), num_heads=1, num_slots=2))
    assert {site: module.hidden_size for site, module in model.memory_sites().items()} == {"middle": HIDDEN, "top": 24}


def test_layers_that_are_dropped_at_random_are_refused():
    config = base_model("opt").config
    config.layerdrop = 0.1
    with pytest.raises(ValueError, match="layerdrop"):
        add_memory(OPTForCausalLM(OPTConfig(**config.to_dict())))


def test_the_last_block_may_be_two_sites():
    """Where nothing comes between the last block and the head, "top" reads what the site before it wrote."""
    ids, gap = random_ids(), []
    for sites in (("layer:3", "top"), ("top", "layer:3")):
        config = MemoryConfig(sites=sites, num_heads=1, num_slots=2, slot_size=4)
        model = wake(add_memory(base_model("opt, norms after"), config))
        seen = {}
        for site, module in model.memory_sites().items():
            module.register_forward_hook(
                lambda module, args, output, site=site, seen=seen: seen.update({site: (args[0], output[0])})
            )
        model(ids)
        assert torch.equal(seen["top"][0], seen["layer:3"][1])
        gap.append((seen["top"][0] - seen["layer:3"][0]).abs().max())
    assert min(gap) > 1e-3


def test_scaled_embeddings_are_stored_as_they_are_in_the_head():
    model, ids = add_memory(base_model("gemma3_text")), random_ids()
    embeds = model.get_input_embeddings()(ids)
    assert (embeds - model._token_embeds(ids, None)).abs().max() > 0.1
    torch.testing.assert_close(model._token_embeds(None, embeds), model._token_embeds(ids, None))
