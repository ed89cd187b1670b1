"""What people do with a transformers model besides the main road: none of it may lose the memory, or lose it silently."""

import io

import pytest
import torch
from decoding import OFTEN, assert_state_after, at_word, padded_prompt, some_state
from tiny import (
    FAMILIES,
    VOCABULARY,
    assert_close,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)
from transformers import GenerationConfig

from gru_memory import AutoModelWithGRUMemory, MemoryConfig, MemoryState, add_memory
from gru_memory.models import memory_class


@pytest.fixture(params=FAMILIES)
def model(request):
    """One a family, for this test alone."""
    return memory_model(request.param, cell="mingru", decay_every="turn")


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def assert_generates(model, **settings):
    """From an empty memory, and `model.memory_state` is right after it."""
    model.memory_state = None
    sequences = model.generate(random_ids(), **{**GREEDY, **settings})
    assert_state_after(model, model.memory_state, sequences, random_ids(), ended=at_word([]))
    return sequences


# The forward pass


def test_hidden_states_are_those_that_the_head_and_the_blocks_read(model):
    """With what the memory recalled: the last ones make the logits, and those of a middle site are among them."""
    after = {}
    for site, module in model.memory_sites().items():
        module.register_forward_hook(lambda module, args, output, site=site: after.update({site: output[0]}))
    output = model(random_ids(), output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    for site, place in (("input", 0), ("middle", 3), ("top", -1)):
        assert torch.equal(output.hidden_states[place], after[site])


def test_attentions_and_the_last_logits_alone(model):
    model.set_attn_implementation("eager")
    output = model(random_ids(), output_attentions=True, logits_to_keep=1)
    assert [weights.shape for weights in output.attentions] == [(2, 4, 20, 20)] * 4
    assert_close(output.logits, model(random_ids()).logits[:, -1:])


def test_a_tuple_with_a_loss(model):
    """As the base model's, and the state comes last."""
    ids = random_ids()
    wanted = model(ids, labels=ids)
    loss, logits, cache, state = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, wanted.loss) and torch.equal(logits, wanted.logits)
    assert cache.get_seq_length() == 20 and isinstance(state, MemoryState)


def test_masks_and_ids_of_other_types(model):
    prompt, mask = padded_prompt()
    wanted = model(prompt, attention_mask=mask)
    for ids, other in ((prompt.int(), mask.bool()), (prompt, mask.double())):
        got = model(ids, attention_mask=other)
        assert_close(got.logits[mask.bool()], wanted.logits[mask.bool()])
        assert_same_state(got.memory_state, wanted.memory_state)


def test_an_input_without_a_token_is_refused(model):
    with pytest.raises(ValueError, match="at least one"):
        model(torch.zeros(2, 0, dtype=torch.long))


# generate()


def test_settings_as_an_object_and_by_position(model):
    settings = GenerationConfig(
        max_new_tokens=5, num_beams=3, num_return_sequences=2, eos_token_id=OFTEN, pad_token_id=0, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    prompt, mask = padded_prompt()
    output = model.generate(prompt, settings, attention_mask=mask)
    assert_state_after(model, output.memory_state, output.sequences, prompt, mask=mask)
    assert model.compute_transition_scores(output.sequences, output.scores, output.beam_indices).shape[0] == 4
    # The batch of the memory is that of the sequences: one of each conversation has to be chosen to go on.
    longer = torch.cat([prompt, random_ids(2, 3)], dim=1)
    with pytest.raises(ValueError, match=r"for 4 conversation\(s\), the input has 2.*select"):
        model.generate(longer, max_new_tokens=2)
    assert model.memory_state is output.memory_state
    model.memory_state = output.memory_state.select([0, 2])
    model.generate(longer, max_new_tokens=2)
    assert model.memory_state.batch_size == 2


def test_settings_of_the_model(model):
    wanted = assert_generates(model)
    model.generation_config.max_new_tokens, model.generation_config.do_sample = 5, False
    model.generation_config.eos_token_id = None
    model.config.use_cache = model.generation_config.use_cache = False
    model.memory_state = None
    assert torch.equal(model.generate(random_ids()), wanted)
    assert_state_after(model, model.memory_state, wanted, random_ids(), ended=at_word([]))


def test_everything_that_generate_can_return(model):
    model.set_attn_implementation("eager")
    names = ("scores", "logits", "hidden_states", "attentions")
    settings = {f"output_{name}": True for name in names}
    output = model.generate(random_ids(), return_dict_in_generate=True, **settings, **GREEDY)
    assert [len(output[name]) for name in names] == [5] * 4
    assert torch.equal(torch.stack(output.logits, 1).argmax(-1), output.sequences[:, 20:])


def test_a_prompt_that_is_left_out(model):
    """Decoding then begins with the token that begins texts."""
    sequences = model.generate(**GREEDY)
    assert_state_after(model, model.memory_state, sequences, sequences[:, :1], ended=at_word([]))


def test_tokens_and_their_embeddings_together(model):
    """The first step reads the embeddings, and the sequences that come back begin with the tokens."""
    embeds = model.get_input_embeddings()(random_ids())
    start = some_state(model)
    wanted = model.generate(inputs_embeds=embeds, memory_state=start, return_dict_in_generate=True, **GREEDY)
    got = model.generate(random_ids(), inputs_embeds=embeds, memory_state=start, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(got.sequences[:, 20:], wanted.sequences)
    assert_same_state(got.memory_state, wanted.memory_state)


def test_training_mode_and_gradient_checkpointing(model):
    """Without a cache, transformers would decode each token from the one before it alone; its base models do."""
    wanted = assert_generates(model)
    model.train()
    assert torch.equal(assert_generates(model), wanted)
    model.gradient_checkpointing_enable()
    model.memory_state = before = some_state(model)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        model.generate(random_ids(), **GREEDY)
    assert model.memory_state is before
    assert torch.equal(assert_generates(model, use_cache=False), wanted)
    model.eval()
    assert torch.equal(assert_generates(model), wanted)


@pytest.mark.parametrize("how", ("forward", "compile"))
def test_compiled_in_the_usual_ways(how):
    torch._dynamo.reset()
    model = memory_model("llama", cell="mingru", decay_every="turn", sites=("top",))
    wanted = assert_generates(model)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    model.memory_state = None
    assert torch.equal(model.generate(random_ids(), **GREEDY), wanted)
    state, model = model.memory_state, memory_model("llama", cell="mingru", decay_every="turn", sites=("top",))
    assert_state_after(model, state, wanted, random_ids(), ended=at_word([]))
    torch._dynamo.reset()


def test_inference_mode(model):
    """What is made there is not in the way of training afterwards."""
    ids = random_ids()
    with torch.inference_mode():
        model.generate(ids, **GREEDY)
        model.generate(ids, cache_implementation="static", **GREEDY)
    model.train()(ids, labels=ids, memory_state=model.memory_state, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.memory_parameters())
    with torch.inference_mode():
        made = memory_model("llama")
        made.generate(ids, **GREEDY)
    made.generate(ids, **GREEDY)
    assert made.memory_state.tokens.tolist() == [50, 50]


# Weights


def test_weights_as_a_state_dict_and_the_model_as_a_pickle(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = memory_model(model.config.model_type, seed=5, cell="mingru", decay_every="turn")
    assert not torch.equal(other(random_ids()).logits, model(random_ids()).logits)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(random_ids()).logits, model(random_ids()).logits)
    assert other.memory_fingerprint() == model.memory_fingerprint()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("settings", ({"max_shard_size": "20KB"}, {"variant": "mine"}), ids=("shards", "variant"))
def test_whole_models_in_other_files(model, tmp_path, settings):
    model.save_pretrained(tmp_path, **settings)
    assert settings.keys() != {"max_shard_size"} or len(list(tmp_path.glob("*.safetensors"))) > 3
    more = {"variant": "mine"} if "variant" in settings else {}
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64, **more)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


@pytest.mark.parametrize("how", ("whole", "base", "base and memory"))
def test_what_from_pretrained_takes(how, tmp_path):
    """The words of transformers' own `from_pretrained`, for a model saved whole, for a base model, and with a memory beside it."""
    model = memory_model("llama").float()
    model.save_memory(tmp_path / "memory")
    (model if how == "whole" else base_model("llama")).save_pretrained(tmp_path / "model")

    def load(**settings):
        if how == "base":
            return AutoModelWithGRUMemory.from_pretrained_with_memory(tmp_path / "model", **settings)
        memory = None if how == "whole" else tmp_path / "memory"
        return AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", memory=memory, **settings)

    half = torch.bfloat16
    for settings, dtype in (
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": half}, half),
        ({"dtype": "float16"}, torch.float16),
        ({"device_map": "auto"}, torch.float32),
        ({"device_map": {"": "cpu"}, "dtype": half}, half),
        ({"attn_implementation": "eager"}, torch.float32),
    ):
        loaded = load(**settings)
        assert type(loaded) is memory_class(type(base_model("llama")))
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        loaded.generate(random_ids(), max_new_tokens=2, do_sample=False)
        assert loaded.memory_state.sites["top"]["slots"].dtype == torch.float32
    loaded, info = load(output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded(random_ids()).memory_state.tokens.tolist() == [20, 20]


def test_more_words_in_the_vocabulary(model):
    model.generate(random_ids(), **GREEDY)
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    with pytest.raises(ValueError, match="another model"):  # what is stored are rows of the head, which has others now
        model.generate(random_ids(), **GREEDY)
    assert_generates(model)


def test_a_memory_on_a_model_whose_gradients_accumulate(model):
    """Two halves of a batch have the gradient of the whole."""
    ids = random_ids(4)
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for half in ids.split(2):
        (model(half, labels=half, use_cache=False).loss / 2).backward()
    assert wanted.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, wanted[name], 1e-6)  # losses are taken in float32


@pytest.mark.parametrize("training", (False, True))
def test_a_new_memory_is_in_the_mode_of_its_model(training):
    model = add_memory(base_model("llama").train(training), MemoryConfig(persistent_slots=2, persistent_floor=0.6))
    assert {site.training for site in model.memory_sites().values()} == {training}
    assert {site.floor for site in model.memory_sites().values()} == {0.0 if training else 0.6}


def test_add_memory_twice_and_on_a_copy_of_the_config():
    """A model made from the config of one with memory is one with an equal memory."""
    model = memory_model("llama")
    again = type(model)(model.config)
    assert again.memory_config == model.memory_config
    assert add_memory(model, model.memory_config) is model
