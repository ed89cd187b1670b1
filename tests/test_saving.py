"""Memories as files: what is in them, what is refused, files of earlier versions, the card, and the hub."""

import copy
import json
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from hub import serve
from huggingface_hub import ModelCard
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import (
    HIDDEN,
    SumSite,
    assert_close,
    assert_same_state,
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
    wake,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gru_memory.saving
from gru_memory import AutoModelWithGRUMemory, GPT2WithGRUMemory, MemoryConfig, MemoryState, add_memory
from gru_memory.base_identity import weights_digest
from gru_memory.config import FORMAT_VERSION
from gru_memory.evaluation import RecallConfig, RecallResult
from gru_memory.evaluation.report import write_report
from gru_memory.evaluation.scoring import Rate
from gru_memory.models import memory_class

FAMILIES = ("gpt2", "llama")
DATA = Path(__file__).parent / "data"
FILES = {"memory_config.json", "memory_model.safetensors", "README.md"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@contextmanager
def unchanged(model):
    """Whatever happens inside, the model still computes what it did and knows what it knew."""
    ids = random_ids()
    before = model(ids).logits
    model.memory_state = state = model(random_ids(2, 5, seed=7)).memory_state.detach()
    memories, trainable = model.memories, [p.requires_grad for p in model.parameters()]
    yield
    assert torch.equal(model(ids).logits, before)
    assert model.memory_state is state
    assert model.memories == memories
    assert [p.requires_grad for p in model.parameters()] == trainable


def recall_report(path, command="gru-memory eval recall --suite"):
    """What `gru-memory eval recall` writes, with figures made up."""
    rows = [
        RecallResult(
            config=RecallConfig(facts=facts),
            memory=Rate.of([True] * hits + [False] * (40 - hits)),
            floor=Rate.of([False] * 40),
            full_history=None,
            old_value=None,
            state_bytes=1234,
            history_tokens=None,
            kv_bytes=None,
            dropped_turns=0,
            seconds={},
            replies=[],
        )
        for facts, hits in ((3, 25), (6, 10))
    ]
    write_report(path, command, 1, rows)
    return path


# What is in the files


def test_no_base_weight_is_in_the_files(family, tmp_path):
    model = memory_model(family)
    model.save_memory(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    saved = load_file(tmp_path / "memory_model.safetensors")
    memory = {f"{site}.{k}": v for site, m in model.memory_sites().items() for k, v in m.state_dict().items()}
    assert {name: tensor.shape for name, tensor in saved.items()} == {k: v.shape for k, v in memory.items()}
    rows = {
        tuple(row)
        for name, p in model.named_parameters()
        if not name.startswith("gru_memory") and p.shape[-1] >= 8
        for row in p.detach().reshape(-1, p.shape[-1]).tolist()
        if len(set(row)) > 1  # biases of zeros and norms of ones say nothing
    }
    assert len(rows) > 300
    for tensor in saved.values():
        assert not rows & {tuple(row) for row in tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).tolist()}
    numbers = sum(t.numel() for t in memory.values())
    assert (tmp_path / "memory_model.safetensors").stat().st_size < 8 * numbers + 10_000
    assert (tmp_path / "memory_config.json").stat().st_size < 2_000


def test_the_config_says_which_base_model_it_is_for(family, tmp_path):
    model = memory_model(family)
    model.config._name_or_path = "ann/base"
    model.save_memory(tmp_path)
    values = json.loads((tmp_path / "memory_config.json").read_text())
    assert values["format_version"] == FORMAT_VERSION
    base = values["base_model"]
    assert base == {
        "name": "ann/base",
        "weights": weights_digest(model),
        "model_type": family,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "vocab_size": 101,
    }
    assert re.fullmatch("[0-9a-f]{32}", base["weights"])


def test_a_folder_on_this_machine_is_told_to_nobody(family, tmp_path):
    base_model(family).save_pretrained(tmp_path / "secret")
    for name in (tmp_path / "secret", "secret/base"):
        model = AutoModelWithGRUMemory.from_pretrained_with_memory(tmp_path / "secret")
        model.config._name_or_path = str(name)
        if isinstance(name, str):
            assert "secret/base" in saved_text(model, tmp_path / "memory")
        else:
            assert "secret" not in saved_text(model, tmp_path / "memory")


def saved_text(model, folder, **options):
    model.save_memory(folder, **options)
    return (folder / "memory_config.json").read_text() + (folder / "README.md").read_text()


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = memory_model()
    model.save_memory(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(gru_memory.saving, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        memory_model("llama").save_memory(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_memory_loads_in_the_precision_of_its_model_and_loses_no_bit_it_can_keep(family, tmp_path):
    model = memory_model(family)
    with torch.no_grad():
        model.memory_sites()["top"].output.weight.mul_(1 + 1e-12)  # float32 has no such numbers
    model.save_memory(tmp_path)
    same, half = add_memory(base_model(family)).double(), add_memory(base_model(family)).to(torch.bfloat16)
    same.load_memory(tmp_path)
    half.load_memory(tmp_path)
    assert torch.equal(same.memory_sites()["top"].output.weight, model.memory_sites()["top"].output.weight)
    assert torch.equal(same(random_ids()).logits, model(random_ids()).logits)
    assert half.memory_sites()["top"].output.weight.dtype == torch.bfloat16
    assert {p.requires_grad for p in same.memory_parameters()} == {True}


def test_whole_numbers_of_a_site_of_your_own_are_not_rounded(tmp_path):
    class Counted(SumSite):
        def __init__(self, *ids):
            super().__init__()
            self.register_buffer("ids", torch.tensor(ids))

    model = add_memory(base_model("llama"), MemoryConfig(), {"top": Counted(4097, 2049)})
    model.save_memory(tmp_path, dtype=torch.float16)
    model.load_memory(tmp_path, sites={"top": Counted(0, 0)})
    assert model.memory_sites()["top"].ids.tolist() == [4097, 2049]


def test_loading_draws_no_random_numbers(tmp_path):
    model = memory_model()
    model.save_memory(tmp_path)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    model.load_memory(tmp_path)
    assert torch.equal(torch.rand(3), wanted)


# The card


def test_the_card_says_what_the_hub_asks_for(family, tmp_path):
    model = memory_model(family)
    model.config._name_or_path = "ann/base"
    model.save_memory(tmp_path, card={"license": "mit", "language": "en", "tags": ["memory", "boats"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("gru-memory", "ann/base", "mit")
    assert card.data.tags == ["gru-memory", "memory", "recurrent", "boats"]
    assert (card.data.language, card.data.pipeline_tag, card.data.eval_results) == ("en", "text-generation", None)
    assert f"| parameters | {model.num_memory_parameters():,} |" in card.text
    assert 'from_pretrained("ann/base"' in card.text.replace("'", '"')
    assert "## Recall" not in card.text
    model.save_memory(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license is None  # not ours to grant


def test_the_figures_of_a_recall_run_are_on_the_card(tmp_path):
    model = memory_model()
    report = recall_report(tmp_path / "recall.json", "gru-memory eval recall --memory=/srv/ann/mine --out /srv/results")
    for recall in (report, str(report), json.loads(report.read_text())):
        model.save_memory(tmp_path / "memory", recall=recall)
        card = ModelCard.load(tmp_path / "memory" / "README.md")
        assert [result.metric_value for result in card.data.eval_results] == [0.625, 0.25]
        assert [result.dataset_config for result in card.data.eval_results] == [
            "3 facts, 12 turns between, unseen values",
            "6 facts, 12 turns between, unseen values",
        ]
        assert card.data.model_name == "Memory for a gpt2 model"
        row = "| 3 facts, 12 turns between, unseen values | 62% (47-76), 25 of 40 | 0% (0-9), 0 of 40 |"
        assert row in card.text
        assert "every turn in its context" not in card.text  # it was not asked
        assert "`gru-memory eval recall --memory=mine --out results`" in card.text
        assert "srv" not in card.text
        assert "1,234 bytes" in card.text


@pytest.mark.parametrize(
    "content",
    (
        None,
        "{",
        "[]",
        '{"results": []}',
        '{"results": [{"label": "books", "loss": 3.1}]}',
        '{"results": [{"label": "3 facts", "memory": null, "floor": null, "full_history": null, "state_bytes": 1}]}',
    ),
)
def test_what_is_no_recall_run_is_refused_and_nothing_written(content, tmp_path):
    report = tmp_path / "report.json"
    if content is not None:
        report.write_text(content)
    with pytest.raises(ValueError, match=r"not what `gru-memory eval recall` writes"):
        memory_model().save_memory(tmp_path / "memory", recall=report)
    assert not (tmp_path / "memory").exists()


def test_a_readme_of_somebody_else_stays(tmp_path):
    model = memory_model()
    (tmp_path / "README.md").write_text("# My notes\n")
    model.save_memory(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"
    (tmp_path / "README.md").unlink()
    model.save_memory(tmp_path)
    model.save_memory(tmp_path, card={"license": "mit"})
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


# What is refused


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_the_digest_of_a_model_is_the_same_in_every_precision(family, dtype):
    model = base_model(family)
    assert weights_digest(copy.deepcopy(model).to(dtype)) == weights_digest(model)
    assert weights_digest(base_model(family, seed=5)) != weights_digest(model)
    assert weights_digest(memory_model(family)) == weights_digest(model)  # a memory is no part of its base
    assert weights_digest(base_model(family).to("meta")) is None


def test_the_digest_sees_small_changes_anywhere(family):
    """As of a fine-tune: 1% of the size of the weights, in one of the blocks alone."""
    model = base_model(family)
    wanted, generator = weights_digest(model), torch.Generator().manual_seed(0)
    for number, block in enumerate(model.transformer.h if family == "gpt2" else model.model.layers):
        kept = copy.deepcopy(block.state_dict())
        with torch.no_grad():
            for weight in block.parameters():
                if weight.dim() > 1:
                    weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=generator)
        assert weights_digest(model) != wanted, number
        block.load_state_dict(kept)
    assert weights_digest(model) == wanted


def test_other_weights_under_a_memory_are_refused_unless_asked_for(family, tmp_path):
    model = memory_model(family)
    model.config._name_or_path = "ann/base"
    model.save_memory(tmp_path)
    other = add_memory(base_model(family, seed=9)).double()
    with unchanged(other), pytest.raises(ValueError, match=r"(?s)other weights.*'ann/base'.*check_base=False"):
        other.load_memory(tmp_path)
    other.load_memory(tmp_path, check_base=False)
    assert other.memory_fingerprint() == model.memory_fingerprint()
    base_model(family, seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other weights"):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "other", tmp_path)
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "other", tmp_path, check_base=False)
    assert loaded.memory_config == model.memory_config


def test_another_family_and_other_sizes_are_refused_whatever_is_asked(tmp_path):
    memory_model("gpt2").save_memory(tmp_path / "gpt2")
    shape = {"num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 20, "vocab_size": 101}
    add_memory(LlamaForCausalLM(LlamaConfig(hidden_size=16, **shape))).save_memory(tmp_path / "narrow")
    model = memory_model("llama")
    for folder, message in (("gpt2", "'model_type': 'gpt2'"), ("narrow", "'hidden_size': 16.*'hidden_size': 32")):
        for check_base in (True, False):
            with unchanged(model), pytest.raises(ValueError, match=message):
                model.load_memory(tmp_path / folder, check_base=check_base)


def nothing(folder):
    (folder / "memory_model.safetensors").unlink()


def pickle_beside(folder):
    torch.save({}, folder / "memory_model.bin")
    nothing(folder)


def torch_pickle(folder):
    torch.save({"top.gate": torch.ones(())}, folder / "memory_model.safetensors")


def plain_pickle(folder):
    (folder / "memory_model.safetensors").write_bytes(pickle.dumps({"top.gate": [1.0] * 9}))


def truncated(folder):
    whole = (folder / "memory_model.safetensors").read_bytes()
    (folder / "memory_model.safetensors").write_bytes(whole[:-10])


def weights_with(change):
    def damage(folder):
        path = folder / "memory_model.safetensors"
        weights = change(load_file(path))
        path.unlink()  # the tensors may still lie in the file
        save_file(weights, path)

    return damage


def config_with(**changes):
    def damage(folder):
        path = folder / "memory_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


DAMAGES = {
    "missing": (nothing, "holds no memory: memory_model.safetensors is missing"),
    "pickle beside": (pickle_beside, "memory_model.bin.*pickle files can run code"),
    "pickle of torch": (torch_pickle, "pickle file under the name"),
    "pickle": (plain_pickle, "pickle file under the name"),
    "truncated": (truncated, "damaged or not a safetensors file"),
    "empty": (lambda folder: (folder / "memory_model.safetensors").write_bytes(b""), "damaged"),
    "nan": (weights_with(lambda w: {**w, "top.gate": w["top.gate"] / 0}), "NaN or infinite"),
    "other shape": (weights_with(lambda w: {**w, "top.gate": torch.ones(2)}), "do not fit.*top.gate"),
    "lacks one": (weights_with(lambda w: {k: v for k, v in w.items() if k != "top.gate"}), "do not fit.*top.gate"),
    "one too many": (weights_with(lambda w: {**w, "transformer.wte": torch.ones(2)}), "do not fit.*transformer.wte"),
    "newer format": (config_with(format_version=FORMAT_VERSION + 1), "newer.*upgrade"),
    "unknown keys": (config_with(surprise=1), r"unknown fields \['surprise'\].*upgrade"),
    "no version": (config_with(format_version="two"), "format_version"),
    "impossible sizes": (config_with(num_slots=10**30), "no memory can have the sizes"),
    "huge sizes": (config_with(num_slots=10**12), "do not fit"),
    "no such layer": (config_with(sites=["layer:77", "input", "top"]), "memory"),
    "own sites unread": (config_with(own_sites={"top": "mine.Site"}), r"site 'top'.*mine\.Site.*sites="),
    "own sites odd": (config_with(own_sites=3), "not a memory config"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_and_foreign_files_are_refused_with_reasons(kind, tmp_path):
    damage, message = DAMAGES[kind]
    model = memory_model("llama")
    model.save_memory(tmp_path)
    damage(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=f"(?s){message}"):
        model.load_memory(tmp_path)


def test_files_too_large_to_be_a_memory_are_not_read(tmp_path, monkeypatch):
    model = memory_model()
    model.save_memory(tmp_path)
    monkeypatch.setattr(gru_memory.saving, "safe_open", None)  # to be called would be an error of its own
    with (tmp_path / "memory_model.safetensors").open("r+b") as file:
        file.truncate(10 << 30)  # sparse
    with unchanged(model), pytest.raises(ValueError, match="10,737,418,240 bytes.*nothing was read"):
        model.load_memory(tmp_path)
    with (tmp_path / "memory_config.json").open("r+b") as file:
        file.truncate(10 << 30)
    with unchanged(model), pytest.raises(ValueError, match="nothing was read"):
        model.load_memory(tmp_path)


def test_what_was_loaded_does_not_lie_in_the_file(family, tmp_path):
    """safetensors maps files into memory: written over in place, they would change under whoever loaded them."""
    model, ids = memory_model(family), random_ids()
    model.save_memory(tmp_path)
    model.load_memory(tmp_path)
    model(ids).memory_state.detach().save(tmp_path / "state")
    state = MemoryState.load(tmp_path / "state")
    wanted = model(ids, memory_state=state).logits
    for name in ("state", "memory_model.safetensors"):
        size = (tmp_path / name).stat().st_size
        with (tmp_path / name).open("r+b") as file:
            file.write(b"\x01" * size)
    assert torch.equal(model(ids, memory_state=state).logits, wanted)


# Files of the version before


@pytest.mark.parametrize("how", ("memory", "model"))
def test_files_of_format_1_load_and_say_the_same(family, how):
    folder = DATA / "format-1" / family
    if how == "memory":
        model = AutoModelWithGRUMemory.from_pretrained(folder / "model", folder / "memory")
    else:
        model = AutoModelWithGRUMemory.from_pretrained(folder / "model")
    assert list(model.memories) == ["default"]
    state = MemoryState.load(folder / "state.safetensors", model.memory_fingerprint())
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        got, without = model(expected["asked"], memory_state=state), model(expected["asked"])
    assert_close(got.logits, expected["logits"], 1e-4)
    assert_close(got.memory_state.sites["top"]["slots"], expected["slots"], 1e-4)
    assert (without.logits - expected["logits"]).abs().max() > 0.1
    assert {site.gate.shape for site in model.memory_sites().values()} == {(1,)}  # FSDP2 refuses ()
    assert all(site.gate.requires_grad for site in model.memory_sites().values())


def test_gates_of_format_2_load_from_a_model_of_several_memories(tmp_path):
    """Gates were numbers, shape (), before format 3, in a whole model as well as in a memory's own file."""
    model = memory_model("llama")
    model.attach_memory(MemoryConfig(sites=("top",), num_slots=3, gate_init=0.25), name="second")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gates = {name for name in weights if name.endswith(".gate")}
    assert len(gates) == 4
    old = {name: tensor.reshape(()) if name in gates else tensor for name, tensor in weights.items()}
    (tmp_path / "model.safetensors").unlink()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["gru_memory"]["format_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))

    again = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64)
    for name in ("default", "second"):
        again.set_memory(name)
        model.set_memory(name)
        assert {site.gate.shape for site in again.memory_sites().values()} == {(1,)}
        assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    model.load_state_dict(old)  # what Trainer does to resume
    assert model.config.gru_memory["format_version"] == again.config.gru_memory["format_version"] == FORMAT_VERSION


def test_a_memory_of_format_2_loads(family, tmp_path):
    """Its gates are numbers, and its config says which base model it is for."""
    model = memory_model(family)
    model.save_memory(tmp_path)
    weights = load_file(tmp_path / "memory_model.safetensors")
    old = {name: tensor.reshape(()) if name.endswith(".gate") else tensor.clone() for name, tensor in weights.items()}
    (tmp_path / "memory_model.safetensors").unlink()
    save_file(old, tmp_path / "memory_model.safetensors", {"format": "pt"})
    config_with(format_version=2)(tmp_path)
    again = add_memory(base_model(family)).double()
    again.load_memory(tmp_path)
    assert {site.gate.shape for site in again.memory_sites().values()} == {(1,)}
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    assert again.memory_fingerprint() == model.memory_fingerprint()  # so states of it go on
    with pytest.raises(ValueError, match="another base model"):
        memory_model("llama" if family == "gpt2" else "gpt2").load_memory(tmp_path)


def test_a_memory_of_format_3_asks_by_queries_of_its_own(tmp_path):
    """Behind an address rank; its config knows nothing of them."""
    model = memory_model("llama", address_rank=6, tied_queries=False)
    model.save_memory(tmp_path)
    path = tmp_path / "memory_config.json"
    values = json.loads(path.read_text())
    del values["tied_queries"], values["signature_size"], values["kept_in"]
    path.write_text(json.dumps({**values, "format_version": 3}))
    again = add_memory(base_model("llama")).double()
    again.load_memory(tmp_path)
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    assert again.memory_fingerprint() == model.memory_fingerprint()
    again.save_memory(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "memory_config.json").read_text())["tied_queries"] is False


def test_a_memory_of_format_1_is_saved_in_the_present_one(family, tmp_path):
    folder = DATA / "format-1" / family
    model = AutoModelWithGRUMemory.from_pretrained(folder / "model", folder / "memory")
    model.save_memory(tmp_path)
    assert json.loads((tmp_path / "memory_config.json").read_text())["format_version"] == FORMAT_VERSION
    again = AutoModelWithGRUMemory.from_pretrained(folder / "model", tmp_path)
    assert again.memory_fingerprint() == model.memory_fingerprint()


def test_the_version_of_a_state_is_in_its_file():
    metadata = MemoryState.read_metadata(DATA / "format-1" / "gpt2" / "state.safetensors")
    assert (metadata["version"], metadata["note"]) == ("1", "format 1")


def test_a_fingerprint_depends_on_later_fields_only_where_they_are_set():
    """Or every state that was ever kept would be refused after an upgrade."""
    assert set(MemoryConfig().meaning()) == {
        *("format_version", "sites", "num_heads", "num_slots", "slot_size"),
        *("decay", "decay_every", "cell", "key_layers"),
    }
    assert MemoryConfig(mode="ephemeral", gate_init=1.0).meaning() == MemoryConfig().meaning()
    assert (
        MemoryConfig(persistent_slots=2, persistent_floor=0.1).meaning() == MemoryConfig(persistent_slots=2).meaning()
    )
    assert MemoryConfig(decay=0.5).meaning() != MemoryConfig().meaning()
    assert MemoryConfig().meaning()["format_version"] == 1


def test_a_config_json_of_a_newer_version_is_refused(family, tmp_path):
    memory_model(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"format_version": FORMAT_VERSION + 1}, "newer"),
        ({"active": "fr"}, "damaged"),
        ({"memories": {"de.fault": {}}}, "cannot be the name"),
    ):
        path.write_text(json.dumps({**values, "gru_memory": {**values["gru_memory"], **change}}))
        with pytest.raises(ValueError, match=message):
            AutoModelWithGRUMemory.from_pretrained(tmp_path)


# Modules of one's own


def own_model(family):
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    model = wake(add_memory(base_model(family), config, {"middle": SumSite()})).double()
    with torch.no_grad():
        model.memory_sites()["middle"].scale.copy_(torch.linspace(-1, 1, HIDDEN))
    return model


def test_a_site_of_your_own_comes_back_where_you_give_it(family, tmp_path):
    model, ids = own_model(family), random_ids()
    wanted = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "model")
    model.save_memory(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"'middle'.*tiny\.SumSite.*sites="):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model")
    loaded = AutoModelWithGRUMemory.from_pretrained(
        tmp_path / "model", sites={"middle": SumSite()}, dtype=torch.float64
    )
    assert torch.equal(loaded(ids, use_cache=False).logits, wanted)

    other = add_memory(base_model(family)).double()
    with unchanged(other), pytest.raises(ValueError, match=r"'middle'.*tiny\.SumSite.*sites="):
        other.load_memory(tmp_path / "memory")
    with unchanged(other), pytest.raises(ValueError, match=r"do not fit.*middle"):
        other.load_memory(tmp_path / "memory", sites={"middle": SumSite(5)})
    other.load_memory(tmp_path / "memory", sites={"middle": SumSite()})
    assert torch.equal(other(ids, use_cache=False).logits, wanted)

    base_model(family).double().save_pretrained(tmp_path / "base")
    both = AutoModelWithGRUMemory.from_pretrained(
        tmp_path / "base", tmp_path / "memory", sites={"middle": SumSite()}, dtype=torch.float64
    )
    assert torch.equal(both(ids, use_cache=False).logits, wanted)
    with pytest.raises(ValueError, match="holds modules"):
        AutoModelWithGRUMemory.from_pretrained_with_memory(tmp_path / "base", sites={"middle": SumSite()})


def test_sites_of_several_memories_are_given_by_name(family, tmp_path):
    model = own_model(family)
    model.save_memory(tmp_path / "memory")
    model.load_memory(tmp_path / "memory", "fr", sites={"middle": SumSite()})
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="all have sites of their own"):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", sites={"middle": SumSite()})
    with pytest.raises(ValueError, match=r"\['de'\]"):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", sites={"de": {"middle": SumSite()}})
    given = {name: {"middle": SumSite()} for name in ("default", "fr")}
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "model", sites=given, dtype=torch.float64)
    for name in ("default", "fr"):
        loaded.set_memory(name)
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


# Loading whole models


def test_a_loaded_model_leaves_its_base_alone(family, tmp_path):
    memory_model(family).save_pretrained(tmp_path)
    model = AutoModelWithGRUMemory.from_pretrained(tmp_path)
    model, information = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"]
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"gru_memory"}


def test_a_refused_memory_costs_no_loading_of_the_base(tmp_path):
    with pytest.raises(ValueError, match="holds no memory"):
        AutoModelWithGRUMemory.from_pretrained("this folder is not even opened", tmp_path)
    memory_model().save_memory(tmp_path)
    for settings in ({"decay": 0.5}, {"num_slots": 3}, {"sites": ("top",)}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} cannot be set together"):
            AutoModelWithGRUMemory.from_pretrained_with_memory("not opened either", memory=tmp_path, **settings)


def test_a_model_that_has_a_memory_is_not_given_an_untrained_one(family, tmp_path):
    model = memory_model(family)
    model.save_pretrained(tmp_path)
    for cls in (type(model), AutoModelWithGRUMemory):
        with pytest.raises(ValueError, match="was saved with a memory.*from_pretrained"):
            cls.from_pretrained_with_memory(tmp_path)
        for settings in ({"decay": 0.5}, {"mode": "ephemeral"}, {"kept_in": "int4"}, {"sites": ("top",)}):
            with pytest.raises(ValueError, match=f"{next(iter(settings))} cannot be set.*brings its own"):
                cls.from_pretrained(tmp_path, **settings)
        loaded = cls.from_pretrained(pretrained_model_name_or_path=tmp_path, dtype=torch.float64)
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


def test_a_base_model_that_refuses_a_memory_stays_a_base_model(tmp_path, monkeypatch):
    memory_model("llama").save_memory(tmp_path)
    base = base_model("gpt2")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: base)
    with pytest.raises(ValueError, match="llama"):
        AutoModelWithGRUMemory.from_pretrained("base", tmp_path)
    assert type(base).__name__ == "GPT2LMHeadModel"
    assert all(p.requires_grad for p in base.parameters())


# Copies and other processes


def test_a_model_can_be_pickled_and_copied(family):
    model = memory_model(family)
    model.memory_state = model(random_ids()).memory_state.detach()
    ids, wanted = random_ids(2, 4, seed=8), model.memory_fingerprint()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert_same_state(twin.memory_state, model.memory_state, 0)
        assert twin.memory_fingerprint() == wanted
        twin.reset(2)
        with torch.no_grad():
            twin.memory_sites()["top"].gate.zero_()
        assert not torch.equal(twin(ids).logits, model(ids).logits)
        assert (twin.memory_fingerprint() == wanted) is False
    assert model.memory_fingerprint() == wanted


def test_a_copy_takes_another_memory_without_touching_the_first(family, tmp_path):
    model = memory_model(family)
    memory_model(family, sites=("layer:1",), cell="mingru").save_memory(tmp_path)
    before, twin = model(random_ids()).logits, copy.deepcopy(model)
    twin.load_memory(tmp_path)
    assert torch.equal(model(random_ids()).logits, before)
    fresh = memory_model(family, sites=("layer:1",), cell="mingru")
    assert torch.equal(twin(random_ids()).logits, fresh(random_ids()).logits)


def test_a_model_goes_to_another_process(family, tmp_path):
    """A fresh interpreter has made no class yet; it is where a worker that is not forked starts."""
    model = memory_model(family)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb'));"
        "sys.stdout.write(type(model).__name__ + ' ' + model.memory_fingerprint())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{type(model).__name__} {model.memory_fingerprint()}", done.stderr


class Own(memory_class(LlamaForCausalLM)):
    """A class of somebody's own, which pickle finds by its name."""


def test_a_class_of_your_own_stays_what_it_is():
    model = Own(base_model("llama").config).eval()
    assert type(pickle.loads(pickle.dumps(model))) is Own
    assert type(copy.deepcopy(model)) is Own


# The hub


@pytest.fixture(scope="module")
def server():
    """One for all tests: transformers keeps the address that it first saw."""
    with serve() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return server


def asked(hub, of):
    """(path, token) of the files asked for in a repository."""
    return {(path, token) for _, path, token in hub.requests if path.startswith(f"/{of}/resolve/")}


def test_a_memory_goes_to_the_hub_and_comes_back(family, hub, tmp_path):
    model = memory_model(family)
    report = recall_report(tmp_path / "recall.json")
    url = model.push_memory_to_hub(
        "ann/boats", recall=report, card={"license": "mit"}, private=True, token="hf_ann", commit_message="Boats"
    )
    assert url.startswith(f"{hub.url}/ann/boats/commit/")
    assert (hub.private["ann/boats"], hub.commits[0]["summary"]) == (True, "Boats")
    files = hub.repositories["ann/boats"]["main"]
    assert set(files) == FILES
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, len(card.data.eval_results)) == ("mit", 2)
    assert "memory='ann/boats'" in card.text
    assert {token for _, path, token in hub.requests if "ann/boats" in path} == {"Bearer hf_ann"}

    hub.requests.clear()
    other = add_memory(base_model(family)).double()
    other.load_memory("ann/boats", token="hf_bob", cache_dir=tmp_path / "cache")
    assert torch.equal(other(random_ids()).logits, model(random_ids()).logits)
    assert asked(hub, "ann/boats") == {
        (f"/ann/boats/resolve/main/{name}", "Bearer hf_bob")
        for name in ("memory_config.json", "memory_model.safetensors")
    }
    assert (tmp_path / "cache" / "models--ann--boats").is_dir()
    hub.repositories.clear()  # what is in the cache needs no hub
    other.load_memory("ann/boats", cache_dir=tmp_path / "cache", local_files_only=True)


def test_branches_and_subfolders_of_the_hub(hub):
    first, second = memory_model("llama"), memory_model("llama", decay=0.5)
    first.push_memory_to_hub("ann/boats", subfolder="en")
    second.push_memory_to_hub("ann/boats", subfolder="en", revision="v2")
    assert set(hub.repositories["ann/boats"]["main"]) == {f"en/{name}" for name in FILES}
    model = add_memory(base_model("llama")).double()
    model.load_memory("ann/boats", subfolder="en")
    assert model.memory_fingerprint() == first.memory_fingerprint()
    model.load_memory("ann/boats", subfolder="en", revision="v2")
    assert model.memory_fingerprint() == second.memory_fingerprint()


def test_a_card_on_the_hub_that_somebody_else_wrote_stays(hub):
    model = memory_model()
    model.push_memory_to_hub("ann/boats")
    model.push_memory_to_hub("ann/boats", card={"license": "mit"})
    files = hub.repositories["ann/boats"]["main"]
    assert "license: mit" in files["README.md"].decode()
    files["README.md"] = b"# My own words"
    model.push_memory_to_hub("ann/boats")
    assert files["README.md"] == b"# My own words"
    assert set(files) == FILES


def test_what_the_hub_does_not_have(hub, tmp_path):
    model = memory_model()
    model.push_memory_to_hub("ann/boats")
    hub.repositories["ann/boats"]["empty"] = {}
    for source, options, error, message in (
        ("ann/cars", {}, OSError, "no folder 'ann/cars' here.*RepositoryNotFoundError.*token"),
        ("ann/boats", {"revision": "v9"}, OSError, "ann/boats at v9.*RevisionNotFoundError"),
        ("ann/boats", {"revision": "empty"}, ValueError, "memory_config.json is missing"),
        ("ann/boats", {"subfolder": "fr"}, ValueError, "ann/boats/fr holds no memory"),
        ("nowhere", {}, ValueError, "nowhere holds no memory"),
        ("./ann/boats", {}, ValueError, "holds no memory"),
    ):
        with unchanged(model), pytest.raises(error, match=f"(?s){message}"):
            model.load_memory(source, **options)


def test_without_the_hub_a_name_is_refused_with_reasons(tmp_path):
    model = memory_model()
    with unchanged(model), pytest.raises(OSError, match="no folder 'ann/boats' here.*cannot be reached"):
        model.load_memory("ann/boats", cache_dir=tmp_path)


def test_a_folder_comes_before_a_repository_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = memory_model(decay=0.5)
    model.save_memory("ann/boats")
    other = memory_model()
    other.load_memory("ann/boats")
    assert other.memory_fingerprint() == model.memory_fingerprint()


def test_a_push_that_is_refused_here_sends_nothing(hub, tmp_path):
    with pytest.raises(ValueError, match="recall"):
        memory_model().push_memory_to_hub("ann/boats", recall=tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="no memory is called 'fr'"):
        memory_model().push_memory_to_hub("ann/boats", "fr")
    assert not hub.repositories


def test_a_base_model_and_a_memory_by_their_names_on_the_hub(family, hub, tmp_path):
    base_model(family).double().push_to_hub("ann/base", revision="main")
    model = memory_model(family)
    model.push_memory_to_hub("ann/boats")
    branches = hub.repositories["ann/base"]
    branches["v1"], branches["main"] = branches["main"], {}
    settings = {"revision": "v1", "token": "hf_ann", "cache_dir": tmp_path / "cache", "dtype": torch.float64}
    classes = [AutoModelWithGRUMemory, *([GPT2WithGRUMemory] if family == "gpt2" else [])]
    for cls in classes:
        hub.requests.clear()
        loaded = cls.from_pretrained_with_memory("ann/base", memory="ann/boats", **settings)
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
        assert {token for _, token in asked(hub, "ann/boats")} == {"Bearer hf_ann"}
        assert {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad} == {"gru_memory"}
    assert type(loaded) is type(model)
    loaded.push_memory_to_hub("ann/again")
    assert ModelCard(hub.repositories["ann/again"]["main"]["README.md"].decode()).data.base_model == "ann/base"


def test_a_whole_model_on_the_hub_is_found_by_revision_and_token(family, hub, tmp_path):
    model = memory_model(family)
    model.push_to_hub("ann/whole")
    branches = hub.repositories["ann/whole"]
    branches["v1"], branches["main"] = branches["main"], {}
    hub.requests.clear()
    settings = {"revision": "v1", "token": "hf_ann", "cache_dir": tmp_path / "cache"}
    loaded = AutoModelWithGRUMemory.from_pretrained("ann/whole", dtype=torch.float64, **settings)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    found = asked(hub, "ann/whole")
    assert ("/ann/whole/resolve/v1/config.json", "Bearer hf_ann") in found
    if Version(transformers.__version__) >= Version("5.23"):  # 5.17 itself asks for some of them without
        assert {token for _, token in found} == {"Bearer hf_ann"}
        assert {path.split("/")[4] for path, _ in found} == {"v1"}


# The documents


def test_the_code_in_the_document_runs(family, hub, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base_model(family).save_pretrained("base")
    recall_report(tmp_path / "results" / "recall.json")
    text = (repository / "docs" / "saving.md").read_text(encoding="utf-8")
    pieces = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(pieces) == text.count("```") // 2 == 4
    names = {}
    for piece in pieces:
        exec(compile(piece, "docs/saving.md", "exec"), names)
    assert "['default', 'fr'] default" in capsys.readouterr().out
    assert hub.private == {"ann/boats": True}
    assert len(ModelCard.load("boats/README.md").data.eval_results) == 2
    assert {path.name for path in (tmp_path / "boats-fr").iterdir()} == FILES
    assert list(names["model"].memories) == ["default"]
