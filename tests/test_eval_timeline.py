"""The timeline: contributions are exact replays, strength over time is what inspection says, and the page holds it all."""

import json
import re

import pytest
import torch
from talking import talking_model, talking_tokenizer
from tiny import assert_close

from gru_memory.data.sessions import Session, Turn, write_jsonl
from gru_memory.evaluation import timeline
from gru_memory.evaluation.batched import BatchReader
from gru_memory.evaluation.timeline import (
    TimelineConfig,
    contributions,
    evaluate_timeline,
    filled,
    left_of_turns,
    plot_timeline,
)
from gru_memory.inspection import trace
from gru_memory.scan.reference import scan_reference

TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("Oh.", "Yes.")]
CONTENT = {"addressing": "content", "address_rank": 6, "signature_size": 5, "slot_size": 10, "num_slots": 6}


@pytest.fixture(scope="module")
def tokenizer():
    return talking_tokenizer("llama")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # with a prefix that memory takes in, and without
def test_a_contribution_is_that_of_a_memory_without_the_write(family):
    """Against slots made by the reference recurrence from what the site computed, with one write set to 0."""
    model, tokenizer = talking_model(family), talking_tokenizer(family)
    reader, seen = BatchReader(model, tokenizer), trace(talking_model(family), talking_tokenizer(family), TURNS)
    inputs, site = [], model.memory_sites()["top"]

    def keep(module, args, kwargs, output):
        found = module.prepare(args[0], **kwargs).inputs
        inputs.append(type(found)(*(field[:, kwargs["mask"][0]] for field in found)))

    hook = site.register_forward_hook(keep, with_kwargs=True)
    state = reader.read_all(reader.start(1), [TURNS])
    hook.remove()
    joined = type(inputs[0])(*(torch.cat(fields, dim=1) for fields in zip(*inputs)))
    assert joined.write.shape[1] == len(seen.tokens)
    question, reply = "Where do you live?", "Porto"
    turn = reader.renderer.turn(question, reply)

    def score(state):
        ids = reader.inputs(state, [turn.ids], left=False)
        logits = model(**ids, memory_state=state).logits[0].log_softmax(-1)
        ids = ids["input_ids"][0]
        first = len(ids) - len(turn.ids) + turn.reply_start
        return sum(logits[at - 1, ids[at]].item() for at in range(first, len(ids)))

    places = [0, 4, len(seen.tokens) // 2, len(seen.tokens) - 2]
    wanted = []
    for place in places:
        write = joined.write.clone()
        write[:, place] = 0
        slots = scan_reference(joined._replace(write=write), reader.start(1).sites["top"]["slots"])[1]
        without = type(state)(**{**vars(state), "sites": {"top": {**state.sites["top"], "slots": slots}}})
        wanted.append(score(state) - score(without))
    got = contributions(reader, TURNS, seen, places, question, reply, batch_size=3)
    assert max(map(abs, wanted)) > 1e-4
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("clock", ["turn", "token"])
@pytest.mark.parametrize("form", [{}, CONTENT], ids=["learned", "content"])
def test_strength_over_time_ends_where_inspection_says(tokenizer, clock, form):
    model = talking_model("llama", decay_every=clock, decay=[0.9, 0.7], **form)
    seen = trace(model, tokenizer, TURNS)
    writes = seen.strength.unsqueeze(-1) * seen.address
    assert bool(form) == bool((seen.keep < 0.69).any())  # below the decays only where a place was taken
    course = filled(writes, seen.keep)
    assert_close(course[-1], seen.left.sum(0), 1e-4)
    half = len(trace(model, tokenizer, TURNS[:2]).tokens)
    assert_close(course[half - 1], trace(model, tokenizer, TURNS[:2]).left.sum(0), 1e-4)
    left = left_of_turns(writes, seen.keep, seen.turns)
    assert left.shape == (len(seen.tokens), 3)
    of_turn = torch.tensor([number == 0 for number in seen.turns])
    first = trace(model, tokenizer, TURNS[:1])
    was = first.left[torch.tensor([number == 0 for number in first.turns])].sum()
    assert left[-1, 0] <= seen.left[of_turn].sum() / was * (1 + 1e-4)
    assert left[len(first.tokens) - 1, 1] == 0 and left[-1, 2] > 0.5


def test_the_page_shows_every_view_and_every_token(tokenizer, tmp_path):
    pytest.importorskip("plotly")
    model = talking_model("llama")
    asks = [Turn("Where do you live?", "In Porto.", learn="answer", kind="ask", value="Porto", fact="f")]
    told = [Turn(user, reply, kind="tell", value="Porto", fact="f") for user, reply in TURNS]
    write_jsonl(tmp_path / "s.jsonl", [Session((Turn("Hi."),)), Session((*told, *asks))])
    config = TimelineConfig(sessions=str(tmp_path / "s.jsonl"), tokens=4, heads=2, max_new_tokens=2, batch_size=3)
    result = evaluate_timeline(model, tokenizer, config)
    seen = trace(model, tokenizer, TURNS)
    assert result.details["tokens"] == seen.tokens
    shown = torch.tensor(result.details["views"]["strength"])[-1]  # (N, S)
    assert (shown - seen.left[:, :2].sum(0)).abs().max() < 1e-3 < (1 - seen.keep).max()
    assert [row["contribution"] for row in result.rows] == sorted(
        (row["contribution"] for row in result.rows), reverse=True
    )
    strongest = seen.strength.mean(1).topk(4).indices.tolist()
    assert sorted(row["position"] for row in result.rows) == sorted(strongest)
    run = json.loads(json.dumps(result.to_json()))
    plot_timeline([run], tmp_path / "page.html", "a <title>")
    page = (tmp_path / "page.html").read_text()
    assert all(f'"label":"{view}"' in page for view in ("writes", "reads", "strength"))
    assert "a <title>" not in page.split("</script>")[-2]
    assert not re.search(r'<script[^>]+src="http', page)  # it needs no network
    assert page.count('"type":"heatmap"') >= 3


def test_tokens_at_which_nothing_was_written_are_not_replayed(tokenizer, monkeypatch):
    def few(*arguments, **settings):
        seen = trace(*arguments, **settings)
        seen.strength[:4] = 0
        seen.strength[7:] = 0
        return seen

    monkeypatch.setattr(timeline, "trace", few)
    config = TimelineConfig(facts=1, between=0, tokens=8, max_new_tokens=2)
    outcome = evaluate_timeline(talking_model("llama"), tokenizer, config)
    assert sorted(row["position"] for row in outcome.rows) == [4, 5, 6]


def test_a_file_in_which_nothing_is_asked_is_refused(tmp_path):
    write_jsonl(tmp_path / "s.jsonl", [Session((Turn("Hi."),))])
    with pytest.raises(ValueError, match="something is asked"):
        TimelineConfig(sessions=str(tmp_path / "s.jsonl")).conversation()
    with pytest.raises(FileNotFoundError, match="one of sessions"):
        TimelineConfig(sessions=str(tmp_path / "none.jsonl"))
