"""Site modules of a user's own: registered, saved, and made anew from a config."""

import json

import pytest
import torch
from memory_files import unchanged
from tiny import HIDDEN, SumSite, base_model, one_thread, random_ids, wake  # noqa: F401 (a fixture)
from torch import nn

from gru_memory import AutoModelWithGRUMemory, MemoryConfig, add_memory, own_sites, register_site

CONFIG = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)


class Counting(SumSite):
    """One with a number that no file holds, and a setting."""

    def __init__(self, width: int, factor: float = 1.0) -> None:
        super().__init__(width)
        self.factor = factor
        self.register_buffer("steps", torch.arange(3.0), persistent=False)

    def forward(self, hidden_states, token_embeds, state, mask, turn_starts):
        out, state = super().forward(hidden_states, token_embeds, state, mask, turn_starts)
        return out * self.factor + self.steps.sum(), state

    def site_config(self):
        return {"width": len(self.scale), "factor": self.factor}


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(own_sites, "_KINDS", {"counting": Counting})
    return own_sites._KINDS


def model_with(site):
    model = wake(add_memory(base_model("llama"), CONFIG, {"middle": site})).double()
    with torch.no_grad():
        model.memory_sites()["middle"].scale.copy_(torch.linspace(-1, 1, HIDDEN))
    return model


def test_a_saved_model_makes_its_own_sites(tmp_path):
    model, ids = model_with(Counting(HIDDEN, 1.5)), random_ids()
    wanted = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())["gru_memory"]["memories"]["default"]["own_sites"]
    assert own == {
        "middle": {
            "kind": "counting",
            "class": "test_own_sites.Counting",
            "arguments": {"width": HIDDEN, "factor": 1.5},
        }
    }
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded.memory_sites()["middle"]) is Counting
    assert torch.equal(loaded(ids, use_cache=False).logits, wanted)
    assert all(p.requires_grad for p in loaded.memory_parameters())
    given = Counting(HIDDEN, 2.0)  # comes before what the file says
    other = AutoModelWithGRUMemory.from_pretrained(tmp_path, dtype=torch.float64, sites={"middle": given})
    assert other.memory_sites()["middle"] is given


def test_a_saved_memory_makes_its_own_sites(tmp_path):
    model, ids = model_with(Counting(HIDDEN, 1.5)), random_ids()
    wanted = model(ids, use_cache=False).logits
    model.save_memory(tmp_path)
    other = add_memory(base_model("llama")).double()
    other.load_memory(tmp_path)
    assert torch.equal(other(ids, use_cache=False).logits, wanted)
    other.load_memory(tmp_path, "second")
    other.set_memory("second")
    assert torch.equal(other(ids, use_cache=False).logits, wanted)


def test_a_kind_that_is_not_registered_names_the_remedy(tmp_path, kinds):
    model = model_with(Counting(HIDDEN))
    model.save_memory(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model")
    del kinds["counting"]
    other = add_memory(base_model("llama")).double()
    message = r"'middle'.*'counting' \(test_own_sites.Counting\).*register_site\('counting', .*sites="
    with unchanged(other), pytest.raises(ValueError, match=message):
        other.load_memory(tmp_path / "memory")
    with pytest.raises(ValueError, match=message):
        AutoModelWithGRUMemory.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": HIDDEN, "colour": 1}, "colour"),
        ({"width": "wide"}, "cannot be made"),
        ([], "cannot be made"),
        ({"width": 1 << 40}, "do not fit"),  # four terabytes, of which nothing is allocated
        ({"width": 5}, "do not fit"),
    ],
)
def test_arguments_that_do_not_make_the_saved_site_are_refused(tmp_path, arguments, message):
    model_with(Counting(HIDDEN)).save_memory(tmp_path)
    path = tmp_path / "memory_config.json"
    values = json.loads(path.read_text())
    values["own_sites"]["middle"]["arguments"] = arguments
    path.write_text(json.dumps(values))
    other = add_memory(base_model("llama")).double()
    with unchanged(other), pytest.raises(ValueError, match=message):
        other.load_memory(tmp_path)


@pytest.mark.parametrize("config", [{"width": {1, 2}}, {3: 4}, ["width"], {"width": (1,)}, None])
def test_a_site_config_that_json_cannot_hold_is_refused(tmp_path, config, monkeypatch):
    monkeypatch.setattr(Counting, "site_config", lambda self: config)
    base = base_model("llama")
    with pytest.raises(ValueError, match="site_config.*'middle'"):
        model_with(Counting(HIDDEN))
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert torch.isfinite(base(random_ids()).logits).all()


class Silent(nn.Module):
    def initial_state(self, batch_size):
        return {}


def test_classes_and_modules_that_lack_a_method_are_refused():
    with pytest.raises(ValueError, match="has no site_config"):
        register_site("sum", SumSite)
    with pytest.raises(ValueError, match="has no forward, site_config"):
        register_site("silent", Silent)
    with pytest.raises(ValueError, match="must be a class"):
        register_site("counting", Counting(HIDDEN))
    with pytest.raises(ValueError, match="give it a name"):
        register_site("", Counting)
    base = base_model("llama")
    kind = type(base)
    for module, message in ((Silent(), "has no forward"), (nn.Linear(2, 2), "no initial_state"), ("top", r"a str")):
        with pytest.raises(ValueError, match=message):
            add_memory(base, CONFIG, {"middle": module})
        assert type(base) is kind


@pytest.mark.parametrize(
    ("sites", "message"),
    (
        (("middle", "top"), r"modules of your own by site.*MemoryConfig\(sites="),  # names, as a config takes them
        ({"input": Counting(HIDDEN)}, r"for sites \['input'\] that are not in config.sites \('middle', 'top'\)"),
        ({"middle": "top"}, "'middle' is given a str"),
    ),
)
def test_what_is_given_for_sites_is_modules_for_sites_that_are_there(sites, message, tmp_path):
    model, base = model_with(Counting(HIDDEN)), base_model("llama")
    model.save_memory(tmp_path)
    kind = type(base)
    with pytest.raises(ValueError, match=message):
        add_memory(base, CONFIG, sites)
    assert type(base) is kind
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.load_memory(tmp_path, sites=sites)


def test_a_class_may_be_registered_again(kinds, tmp_path):
    """As a cell of a notebook that is run twice does."""
    model_with(Counting(HIDDEN, 1.5)).save_memory(tmp_path)
    again = type("Counting", (Counting,), {})
    register_site("counting", again)
    other = add_memory(base_model("llama")).double()
    other.load_memory(tmp_path)
    assert type(other.memory_sites()["middle"]) is again
