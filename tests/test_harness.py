"""The model `gru-memory` of lm-evaluation-harness: memory starts empty in every request and carries what attention cannot see."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from talking import FAMILIES, talking_model, talking_tokenizer
from test_adapters import base  # noqa: F401 (a fixture)
from tiny import base_model, one_thread  # noqa: F401 (a fixture)

from gru_memory import MemoryConfig, add_memory
from gru_memory.evaluation import harness
from gru_memory.evaluation.harness import GRUMemoryLM
from gru_memory.rendering import TurnRenderer

TASKS = Path(__file__).resolve().parent / "data" / "lm_eval"
DOCS = [json.loads(line) for line in (TASKS / "boats.jsonl").read_text().splitlines()]
BLANK = "\n\n"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return talking_model(family)


def harness_model(model, family="llama", **settings):
    return GRUMemoryLM(model, tokenizer=talking_tokenizer(family), **{"batch_size": 4, **settings})


def request(kind, *arguments, number=0):
    return Instance(kind, {}, arguments, number)


def scored(lm, pairs):
    return [
        logp for logp, _ in lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    ]


def context(doc):
    return BLANK.join([*doc["told"], doc["question"]])


PAIRS = [(context(doc), " " + choice) for doc in DOCS for choice in doc["choices"]]


@torch.no_grad()
def one_by_one(model, pieces, targets):
    """Log-likelihood of `targets` after the last of `pieces` (ids, how many are hidden), one forward pass a piece."""
    state = model.initial_memory_state(1)
    for i, (ids, hidden) in enumerate(pieces):
        ids = torch.tensor([ids + (targets if i == len(pieces) - 1 else [])])
        seen = torch.ones_like(ids, dtype=torch.bool)
        seen[:, :hidden] = False
        out = model(ids, memory_state=state, memory_mask=seen, use_cache=False)
        state = out.memory_state
    logp = out.logits[0, -len(targets) - 1 : -1].float().log_softmax(-1)
    return logp.gather(1, torch.tensor(targets)[:, None]).sum().item()


def test_whole_contexts_are_scored_as_hf_scores_them(model, family):
    """One forward pass sees it all, and nothing is left over from one request to the next."""
    ours = scored(harness_model(model, family), PAIRS)
    theirs = scored(HFLM(model, tokenizer=talking_tokenizer(family), batch_size=4), PAIRS)
    assert ours == pytest.approx(theirs)
    assert scored(harness_model(model, family), PAIRS[3:4]) == pytest.approx(ours[3:4], rel=1e-4)
    assert model.memory_state is None
    with model.disable_memory():
        silent = scored(HFLM(model, tokenizer=talking_tokenizer(family)), PAIRS)
    assert scored(harness_model(model, family, without_memory=True), PAIRS) == pytest.approx(silent, rel=1e-4)
    assert ours != pytest.approx(silent, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_pieces_at_a_separator_are_what_memory_carries(model, family, batch_size):
    lm, encode = (
        harness_model(model, family, segment_separator=r"\n\n", batch_size=batch_size),
        talking_tokenizer(family).encode,
    )
    wanted = []
    for text, continuation in PAIRS:
        *told, question = text.split(BLANK)
        pieces = [(encode(part + BLANK), 0) for part in told] + [(encode(question), 0)]
        wanted.append(one_by_one(model, pieces, encode(continuation)))
    assert scored(lm, PAIRS) == pytest.approx(wanted, rel=1e-4)


def test_pieces_of_some_tokens_are_what_memory_carries(model, family):
    lm, encode = harness_model(model, family, segment_tokens=7), talking_tokenizer(family).encode
    wanted = []
    for text, continuation in PAIRS:
        ids = encode(text)
        first = len(ids) % 7
        pieces = [ids[:first]] * bool(first) + [ids[i : i + 7] for i in range(first, len(ids), 7)]
        assert sum(pieces, []) == ids
        wanted.append(one_by_one(model, [(piece, 0) for piece in pieces], encode(continuation)))
    assert scored(lm, PAIRS) == pytest.approx(wanted, rel=1e-4)


def test_pieces_as_turns_are_a_conversation(model, family):
    """The system prompt, where there is one, is seen by attention in every turn and by memory once."""
    tokenizer = talking_tokenizer(family)
    lm, renderer = harness_model(model, family, segment_separator=BLANK, as_turns=True), TurnRenderer(tokenizer)
    prefix, wanted = renderer.prefix_ids, []
    for text, continuation in PAIRS:
        *told, question = text.split(BLANK)
        turns = [renderer.turn(part).ids for part in told] + [renderer.prompt(question)]
        pieces = [(prefix + ids, len(prefix) if i else 0) for i, ids in enumerate(turns)]
        wanted.append(one_by_one(model, pieces, tokenizer.encode(continuation.strip())))
    assert scored(lm, PAIRS) == pytest.approx(wanted, rel=1e-4)


def test_without_memory_only_the_last_piece_counts(model, family):
    changed = [(text.replace("Marigold", "Porto").replace("Juniper", "Lisbon"), answer) for text, answer in PAIRS]
    assert changed != PAIRS
    silent = harness_model(model, family, segment_separator=BLANK, without_memory=True)
    assert scored(silent, changed) == pytest.approx(scored(silent, PAIRS))
    heard = harness_model(model, family, segment_separator=BLANK)
    assert scored(heard, changed) != pytest.approx(scored(heard, PAIRS), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"segment_separator": BLANK}, {"segment_separator": BLANK, "as_turns": True}])
def test_answers_are_generated_from_the_state_of_the_pieces(model, family, settings):
    tokenizer, wanted = talking_tokenizer(family), []
    lm = harness_model(model, family, **settings)
    kinds = [{"until": ["."], "max_gen_toks": 6}, {"until": ["\n"], "max_gen_toks": 4}]
    asked = [request("generate_until", context(doc), kinds[i % 2]) for i, doc in enumerate(DOCS)]
    for instance in asked:
        text, kind = instance.args
        *told, question = text.split(BLANK) if settings else [text]
        state, renderer = model.initial_memory_state(1), TurnRenderer(tokenizer)
        if "as_turns" in settings:
            turns, prefix = [*(renderer.turn(t).ids for t in told), renderer.prompt(question)], renderer.prefix_ids
        else:
            turns, prefix = [*(tokenizer.encode(t + BLANK) for t in told), tokenizer.encode(question)], []
        for i, ids in enumerate(turns):
            ids = torch.tensor([prefix + ids])
            seen = torch.ones_like(ids, dtype=torch.bool)
            seen[:, : len(prefix) if i else 0] = False
            given = {"memory_state": state, "memory_mask": seen}
            if i < len(turns) - 1:
                state = model(ids, **given, use_cache=False).memory_state
        room = {
            "max_new_tokens": kind["max_gen_toks"],
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        said = model.generate(ids, **given, **room, return_dict_in_generate=True).sequences[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True)
        for stop in (*kind["until"], tokenizer.eos_token):
            text = text.split(stop)[0]
        wanted.append(text)
    assert lm.generate_until(asked, disable_tqdm=True) == wanted
    assert any(wanted)
    assert model.memory_state is None


@torch.no_grad()
def test_texts_are_scored_window_by_window_and_each_token_is_met_once(model, family):
    tokenizer, texts = talking_tokenizer(family), [context(doc) for doc in DOCS]
    lm = harness_model(model, family, segment_tokens=9)
    got = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts], disable_tqdm=True)
    for text, logp in zip(texts, got):
        ids, state, wanted = tokenizer.encode(text), None, 0.0
        inputs = [lm.prefix_token_id, *ids[:-1]]
        for i in range(0, len(ids), 9):
            out = model(torch.tensor([inputs[i : i + 9]]), memory_state=state, use_cache=False)
            state, targets = out.memory_state, torch.tensor(ids[i : i + 9])
            wanted += out.logits[0].float().log_softmax(-1).gather(1, targets[:, None]).sum().item()
        assert state.tokens.item() == len(ids)
        assert logp == pytest.approx(wanted, rel=1e-4)
    whole = harness_model(model, family).loglikelihood_rolling(
        [request("loglikelihood_rolling", t) for t in texts], True
    )
    assert whole != pytest.approx(got, rel=1e-3)


def test_a_token_that_begins_texts_is_taken_in_once():
    lm = harness_model(talking_model("llama"), segment_separator=BLANK)
    plain = [(piece.ids, piece.hidden) for piece in lm._pieces(*PAIRS[0])]
    encode, bos = lm.tok_encode, lm.tokenizer.bos_token_id
    lm.tok_encode = lambda text, add_special_tokens=None, **_: [bos] * (add_special_tokens is not False) + encode(text)
    assert [(p.ids, p.hidden) for p in lm._pieces(*PAIRS[0])] == [
        ([bos, *ids], int(i > 0)) for i, (ids, _) in enumerate(plain)
    ]


def test_what_cannot_be_done_is_refused_with_reasons(model, family):
    for settings, message in (
        ({"segment_tokens": 0}, "at least 1"),
        ({"segment_separator": ""}, "empty"),
        ({"as_turns": True, "segment_tokens": 5}, "segment_separator instead"),
        ({"batch_size": "auto"}, "a number"),
        ({"dtype": "bfloat16", "peft": "adapter"}, "dtype, peft would have no effect"),
        ({"memory": "folder"}, "memory would have no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            harness_model(model, family, **settings)
    with pytest.raises(ValueError, match="no memory"):
        GRUMemoryLM(base_model("llama"), tokenizer=talking_tokenizer("llama"))
    with pytest.raises(ValueError, match="as_turns"):
        harness_model(model, family, as_turns=True).loglikelihood_rolling([])
    with pytest.raises(ValueError, match="cut finer"):
        scored(harness_model(model, family, segment_separator=BLANK, max_length=10), PAIRS)


@pytest.fixture
def saved(base, tmp_path):  # noqa: F811 (the fixture)
    """The folders of a base model with its tokenizer, and of a memory for it."""
    talking_tokenizer("llama").save_pretrained(base)
    model = talking_model("llama", sites=("middle", "top"), key_layers=(0,)).float()
    model.save_memory(tmp_path / "memory")
    return base, tmp_path / "memory"


def test_lm_eval_runs_a_local_task(saved):
    """By name, from folders, through `simple_evaluate`; the figures are those of the requests."""
    harness.register()
    harness.register()  # once is as good as twice
    folder, memory = map(str, saved)
    settings = {"pretrained": folder, "memory": memory, "segment_separator": BLANK, "device": "cpu"}
    tasks = {"tasks": ["boats", "boats_free", "boats_text"], "task_manager": TaskManager(include_path=str(TASKS))}
    found = lm_eval.simple_evaluate("gru-memory", model_args=settings, batch_size=4, bootstrap_iters=0, **tasks)
    lm = GRUMemoryLM(**settings, batch_size=3)
    logp = torch.tensor(scored(lm, PAIRS)).view(-1, 2)
    assert found["results"]["boats"]["acc,none"] == sum(
        int(row.argmax()) == doc["answer"] for row, doc in zip(logp, DOCS)
    ) / len(DOCS)
    got = [sample["resps"][0][0][0] for sample in found["samples"]["boats"]]
    assert got == pytest.approx(logp[:, 0].tolist(), rel=1e-4)
    assert len(found["samples"]["boats_free"]) == len(DOCS)
    assert found["results"]["boats_text"]["word_perplexity,none"] > 1


def test_a_model_saved_whole_is_loaded_with_its_memory(saved, tmp_path):
    folder, memory = saved
    with_memory = GRUMemoryLM(str(folder), memory=str(memory), segment_separator=BLANK, device="cpu")
    with_memory.model.save_pretrained(tmp_path / "whole")
    talking_tokenizer("llama").save_pretrained(tmp_path / "whole")
    whole = GRUMemoryLM(str(tmp_path / "whole"), segment_separator=BLANK, device="cpu")
    assert scored(whole, PAIRS) == pytest.approx(scored(with_memory, PAIRS))
    with pytest.raises(ValueError, match="memory=<folder"):
        GRUMemoryLM(str(folder), device="cpu")


def test_the_entry_point_names_the_class(repository):
    line = f'{harness.NAME} = "'
    project = (repository / "pyproject.toml").read_text().partition('[project.entry-points."lm_eval.models"]')[2]
    (point,) = [text.removeprefix(line).strip('"') for text in project.splitlines() if text.startswith(line)]
    module, _, name = point.partition(":")
    assert getattr(sys.modules[module], name) is GRUMemoryLM
    harness.register()
    assert get_model(harness.NAME) is GRUMemoryLM
    assert "hf" in model_registry


@pytest.mark.slow
@pytest.mark.needs_model
def test_the_shipped_memory_carries_what_was_told(tmp_path):
    """The command of docs/lm_eval.md, and the same evaluation without the memory."""
    command = [
        sys.executable, "-m", "gru_memory.evaluation.harness", "run", "--model", "gru-memory", "--model_args",
        r"pretrained=smollm2,segment_separator=\n\n,as_turns=True,without_memory=False", "--tasks", "boats",
        "--include_path", str(TASKS), "--batch_size", "4", "--output_path", str(tmp_path),
    ]  # fmt: skip
    result = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["boats"]["acc,none"] == 1.0
    harness.register()
    settings = {"pretrained": "smollm2", "segment_separator": BLANK, "as_turns": True, "without_memory": True}
    tasks = {"tasks": ["boats"], "task_manager": TaskManager(include_path=str(TASKS))}
    without = lm_eval.simple_evaluate("gru-memory", model_args=settings, batch_size=4, bootstrap_iters=0, **tasks)
    assert without["results"]["boats"]["acc,none"] < 0.7


def test_an_untrained_memory_is_the_model_hf():
    """Gate 0, whole contexts: lm_eval's own figures."""
    plain = base_model("llama")
    wanted = scored(HFLM(plain, tokenizer=talking_tokenizer("llama"), batch_size=4), [("a", "b")])
    model = add_memory(plain, MemoryConfig())
    assert scored(harness_model(model), [("a", "b")]) == wanted
