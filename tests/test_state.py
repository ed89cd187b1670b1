"""`MemoryState`: a value that is sliced, moved, saved, and refused where it does not belong."""

import json
import os
import stat
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_close, assert_same_state, base_model, memory_model, one_thread, random_ids  # noqa: F401

import gru_memory.state
from gru_memory import MemoryState, add_memory
from gru_memory.state import AS_KEPT
from gru_memory.whole_files import replacing, write_whole


@pytest.fixture(scope="module")
def model():
    return memory_model(decay=[0.5, 0.9])


@pytest.fixture
def state(model):
    """Three conversations, one of them padded."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        return model(random_ids(3, 9), attention_mask=mask).memory_state


def tensors(state):
    return [t for kept in state.sites.values() for t in kept.values()] + [
        state.tokens,
        state.turns,
        state.pending,
    ]


def test_what_a_state_says_of_itself(model, state):
    assert state.batch_size == 3
    assert state.tokens.tolist() == [9, 5, 9]
    assert state.turns.tolist() == [1, 1, 1]
    assert state.fingerprint == model.memory_fingerprint()
    slots = 3 * 3 * 2 * 4 * 8 * 8  # sites, rows, heads, slots, floats, bytes each
    keys = 3 * 3 * (2 * 4 + 2) * 8
    assert state.num_bytes == slots + keys + 3 * (8 + 8 + 1)
    assert state.is_finite()
    with pytest.raises(FrozenInstanceError):
        state.tokens = state.turns
    assert state != state.clone()
    assert {state: 1}[state] == 1


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (1, [1]),
        (-1, [2]),
        ([2, 0], [2, 0]),
        ([1, 1, 1], [1, 1, 1]),
        (torch.tensor([0, -2]), [0, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([], []),
    ],
)
def test_select_then_cat(state, rows, wanted):
    got = state.select(rows)
    assert got.batch_size == len(wanted)
    if wanted:
        assert_same_state(got, MemoryState.cat([state.select(row) for row in wanted]), 0)


@pytest.mark.parametrize("rows", (3, -4, [0, 3], torch.tensor([True, False])))
def test_rows_that_are_not_there(state, rows):
    with pytest.raises(IndexError):
        state.select(rows)


def test_cat_refuses_what_does_not_go_together(state):
    with pytest.raises(ValueError, match="at least one"):
        MemoryState.cat([])
    with pytest.raises(ValueError, match="different models"):
        MemoryState.cat([state, memory_model("llama").initial_memory_state(1)])
    with pytest.raises(ValueError, match="layout"):
        other = memory_model(sites=("top",)).initial_memory_state(1)
        MemoryState.cat([state, MemoryState(**{**other.__dict__, "fingerprint": state.fingerprint})])


def test_cat_refuses_rows_that_fade_or_are_kept_differently(state):
    halved = {site: rate / 2 for site, rate in state.decay_rates.items()}
    for other in ({"decay_rates": halved}, {"decay_rates": {}}, {"kept_in": "int4"}, {"addressing": "content"}):
        with pytest.raises(ValueError, match="cannot share a batch"):
            MemoryState.cat([state, replace(state, **other)])
    copied = {site: rate.clone() for site, rate in state.decay_rates.items()}
    assert MemoryState.cat([state, replace(state, decay_rates=copied)]).batch_size == 6


def test_repeat(state):
    assert_same_state(state.repeat_interleave(2), state.select([0, 0, 1, 1, 2, 2]), 0)
    assert_same_state(state.repeat_interleave(1), state, 0)


def test_detach_and_clone(model):
    state = model(random_ids()).memory_state
    assert all(kept["slots"].requires_grad for kept in state.sites.values())
    assert not any(t.requires_grad for t in tensors(state.detach()))
    copy = state.clone()
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(tensors(copy), tensors(state), strict=True))
    assert_same_state(copy, state, 0)
    assert copy.sites["top"]["slots"].requires_grad


@pytest.mark.parametrize("arguments", ({"dtype": torch.float16}, (torch.float16,), ("cpu", torch.float16)))
def test_to_casts_floats_and_leaves_counters(state, arguments):
    half = state.to(**arguments) if isinstance(arguments, dict) else state.to(*arguments)
    assert half.sites["top"]["slots"].dtype == torch.float16
    assert (half.tokens.dtype, half.pending.dtype) == (torch.int64, torch.bool)
    assert_same_state(half.to(torch.float64), state, 2e-3)


def test_to_moves_everything(state):
    moved = state.to("meta")
    assert {t.device.type for t in [*tensors(moved), *moved.decay_rates.values()]} == {"meta"}
    assert {t.device.type for t in tensors(state)} == {"cpu"}


@pytest.mark.parametrize("ticks", (0, 1, 3, 0.5))
def test_time_that_passes_without_a_word(state, ticks):
    later = state.decay(ticks)
    rate = torch.tensor([0.5, 0.9], dtype=torch.float64).view(1, 2, 1, 1)
    for site, kept in state.sites.items():
        assert_close(later.sites[site]["slots"], rate**ticks * kept["slots"], 1e-12)
        assert torch.equal(later.sites[site]["address"], kept["address"])
    for backwards in (-1, float("nan")):
        with pytest.raises(ValueError, match="forwards"):
            state.decay(backwards)


def test_save_and_load_keep_every_bit(model, state, tmp_path):
    state.save(tmp_path / "state", metadata={"who": "Ada"})
    loaded = MemoryState.load(tmp_path / "state", model.memory_fingerprint())
    assert_same_state(loaded, state, 0)
    assert loaded.fingerprint == state.fingerprint
    assert {k: t.dtype for k, t in loaded.sites["top"].items()} == {k: t.dtype for k, t in state.sites["top"].items()}
    assert_same_state(loaded.decay(2), state.decay(2), 0)
    assert MemoryState.read_metadata(tmp_path / "state")["who"] == "Ada"
    ids = random_ids(3, 4, seed=9)
    assert torch.equal(model(ids, memory_state=loaded).logits, model(ids, memory_state=state).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_bytes_are_those_of_the_file(state, tmp_path):
    state.save(tmp_path / "state", torch.float16, {"who": "Ada"})
    data = state.to_bytes(torch.float16, {"who": "Ada"})
    assert MemoryState.read_metadata(data) == MemoryState.read_metadata(tmp_path / "state")
    assert_same_state(MemoryState.from_bytes(data), MemoryState.load(tmp_path / "state"), 0)
    with pytest.raises(ValueError, match="the upload is damaged"):
        MemoryState.from_bytes(data[:-1], name="the upload")


def test_half_precision_on_disk_is_close_and_smaller(model, state, tmp_path):
    state.save(tmp_path / "whole")
    state.save(tmp_path / "half", torch.float16)
    loaded = MemoryState.load(tmp_path / "half", model.memory_fingerprint())
    assert loaded.sites["top"]["slots"].dtype == torch.float64
    assert_close(loaded.sites["top"]["slots"], state.sites["top"]["slots"], 5e-4)
    assert_same_state(loaded, state, 2e-3)
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "whole").stat().st_size


def test_four_bits_on_disk_are_close_and_an_eighth(model, state, tmp_path):
    state.save(tmp_path / "whole", torch.float32)
    state.save(tmp_path / "packed", "int4")
    loaded = MemoryState.load(tmp_path / "packed", model.memory_fingerprint())
    for site, kept in state.sites.items():
        assert loaded.sites[site]["slots"].dtype == kept["slots"].dtype
        assert_close(loaded.sites[site]["slots"], kept["slots"].clamp(-1, 1), 1 / 14 + 1e-6)
        assert_close(loaded.sites[site]["address"], kept["address"], 2e-3)
    slots = sum(kept["slots"].numel() for kept in state.sites.values())
    assert (tmp_path / "whole").stat().st_size - (tmp_path / "packed").stat().st_size > 3.4 * slots
    again = loaded.to_bytes("int4")
    assert_same_state(MemoryState.from_bytes(again), loaded, 1e-6)  # packed once, it stays what it is


def test_a_state_is_kept_in_what_its_config_says(tmp_path):
    model = memory_model(kept_in="int4")
    state = model(random_ids(2, 9)).memory_state
    assert state.kept_in == "int4"
    loaded = MemoryState.from_bytes(state.to_bytes(AS_KEPT))
    assert loaded.kept_in == "int4"
    assert_same_state(loaded, MemoryState.from_bytes(state.to_bytes("int4")), 0)
    assert model.memory_fingerprint() == memory_model().memory_fingerprint()  # how it is stored changes no meaning
    with pytest.raises(ValueError, match="int4"):
        state.to_bytes("int3")


def test_sites_of_your_own_may_keep_anything_under_any_name(state):
    own = {
        "slots": torch.tensor([[7.75, -2.0, 0.5]] * 3),
        "a/slots": torch.tensor([[1, 300]] * 3),
        "a/sum": torch.ones(3, 2),
    }
    state = replace(state, sites={**state.sites, "layer:1": own})
    assert_same_state(MemoryState.from_bytes(state.to_bytes()), state, 0)
    packed = MemoryState.from_bytes(state.to_bytes("int4"))
    assert packed.sites["layer:1"].keys() == own.keys()
    assert all(torch.equal(packed.sites["layer:1"][key], tensor) for key, tensor in own.items())


def test_numbers_that_are_not_finite_are_not_packed_away(state):
    state.sites["top"]["slots"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        MemoryState.from_bytes(state.to_bytes("int4"))


@pytest.mark.parametrize(
    "packed", ("[]", '{"site/top/slots": [1, 2]}', '{"site/top/slots": "x"}', '{"none": [1]}', "{")
)
def test_packing_that_does_not_fit_is_refused(state, tmp_path, packed):
    with pytest.raises(ValueError, match="damaged"):
        MemoryState.load(rewritten(tmp_path / "state", state, {"packed": packed}))


def test_a_state_of_another_memory_is_refused(state, tmp_path):
    state.save(tmp_path / "state")
    for other in (memory_model("llama"), memory_model(decay=0.9), memory_model(sites=("top",))):
        with pytest.raises(ValueError, match="another model or memory"):
            MemoryState.load(tmp_path / "state", other.memory_fingerprint())
    assert MemoryState.load(tmp_path / "state").batch_size == 3  # whoever gives no fingerprint wants no check


def test_the_fingerprint_follows_the_weights_but_not_their_precision_in_memory(tmp_path):
    model = memory_model()
    before = model.memory_fingerprint()
    assert model.memory_fingerprint() == before == memory_model().memory_fingerprint()
    with torch.no_grad():
        model.memory_sites()["top"].output.weight.mul_(1.5)
    changed = model.memory_fingerprint()
    assert changed != before
    model.to(torch.bfloat16)  # swaps the numbers under the same parameters
    model.save_memory(tmp_path)
    same = memory_model().to(torch.bfloat16)
    same.load_memory(tmp_path)
    assert model.memory_fingerprint() == same.memory_fingerprint() == changed
    with torch.no_grad():
        same.memory_sites()["top"].output.weight.mul_(1.5)
    assert same.memory_fingerprint() not in (before, changed)  # what the file says holds for its own weights alone


def damaged(path, content):
    path.write_bytes(content)
    return path


def test_a_truncated_file_is_refused(state, tmp_path):
    state.save(tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="damaged"):
            MemoryState.load(damaged(tmp_path / "cut", whole[:size]))


def rewritten(path, state, header=None, change=None):
    """The file of a state with something about it changed."""
    state.save(path)
    fields = {**MemoryState.read_metadata(path), **(header or {})}
    content = load_file(path)
    save_file(change(content) if change else content, path, fields)
    return path


COUNTERS = {"tokens": "int64", "turns": "int64", "pending": "bool"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"kind": "adapter"}, "not a memory state"),
        ({"version": "99"}, "newer version"),
        ({"version": "one"}, "damaged"),
        ({"dtypes": "{"}, "damaged"),
        ({"dtypes": "[]"}, "damaged"),
        ({"dtypes": json.dumps({"tokens": "nn"})}, "damaged"),
        ({"dtypes": json.dumps({"tokens": 3})}, "damaged"),
        *(
            ({"dtypes": json.dumps({**COUNTERS, name: dtype})}, "no whole numbers")
            for name, dtype in (("tokens", "complex64"), ("turns", "float32"), ("pending", "int64"))
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(state, tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        MemoryState.load(rewritten(tmp_path / "state", state, header))


def without(name):
    return lambda content: {k: t for k, t in content.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokens"), "damaged"),
        (lambda content: {k: t for k, t in content.items() if not k.startswith("site/")}, "damaged"),
        (lambda content: {**content, "site/top/slots": content["site/top/slots"][:1].clone()}, "damaged"),
        (lambda content: {**content, "site/top/slots": content["site/top/slots"] * torch.nan}, "NaN"),
        (lambda content: {**content, "site/top/address": content["site/top/address"] / 0}, "NaN"),
    ],
)
def test_a_file_with_wrong_content_is_refused(state, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        MemoryState.load(rewritten(tmp_path / "state", state, change=change))


def test_a_site_that_is_missing_is_noticed_by_the_model(model, state, tmp_path):
    partial = MemoryState.load(rewritten(tmp_path / "state", state, change=without("site/top/slots")))
    with pytest.raises(ValueError, match="slots"):
        model(random_ids(3, 4), memory_state=partial)


def test_a_file_too_large_to_be_a_state_is_not_read(state, tmp_path, monkeypatch):
    state.save(tmp_path / "state")
    monkeypatch.setattr(gru_memory.state, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="no memory state is that large"):
        MemoryState.load(tmp_path / "state")


def test_a_pipe_is_no_state(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            MemoryState.load(path)


def test_a_save_that_fails_leaves_what_was_there(model, state, tmp_path, monkeypatch):
    state.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()

    def full_disk(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        model.initial_memory_state(3).save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_file_is_written_beside_others_and_for_its_owner_alone(state, tmp_path):
    name = "y" * 255
    (tmp_path / "state.part").write_text("mine")
    for path in (tmp_path / "state", tmp_path / name):
        state.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "usual").touch()
    write_whole(tmp_path / "results", b"{}")
    assert (tmp_path / "results").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "state.part").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "state", "state.part", "usual", name]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_written_over_no_other(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *paths: os.open("/dev/null/x", os.O_RDONLY))
    write_whole(tmp_path / "file", b"one", new=True)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", b"two", new=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"one")]


def test_a_large_file_is_replaced_whole_and_two_that_write_it_at_once_do_not_meet(tmp_path):
    path = tmp_path / "states.bin"
    with replacing(path) as one, replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
        assert one != two and not path.exists()
    assert path.read_text() == "one"  # the later one, for the inner block ends first
    with pytest.raises(OSError, match="full"), replacing(path) as part:
        part.write_text("hal")
        raise OSError("full")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("states.bin", "one")]


def test_a_state_is_shown_in_one_line(model, state):
    shown = repr(state)
    assert "\n" not in shown and len(shown) < 300
    assert f"tokens={state.tokens.tolist()}" in shown and f"{state.num_bytes:,} bytes" in shown and "top" in shown


def test_what_is_no_state_or_config_is_refused_in_words(model):
    with pytest.raises(ValueError, match="memory_state is a str"):
        model.memory_state = "state"
    with pytest.raises(TypeError, match="config is a dict: give a MemoryConfig"):
        add_memory(base_model(), {"num_slots": 4})
