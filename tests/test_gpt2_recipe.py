"""`gru-memory train --model FOLDER` on a plain GPT-2, without a chat template: the memory fits GPT2WithGRUMemory and is asked."""

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from talking import talking_base, talking_tokenizer
from tiny import one_thread  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from gpt2_gru_memory import GPT2WithGRUMemory
from gru_memory.cli.app import app

LITTLE = ["--num-heads", 2, "--num-slots", 4, "--slot-size", 8, "--signature-size", 4, "--steps", 2, "--rows", 2]
LITTLE += ["--validate-every", 2, "--address-rank", 200]  # more than a key of so small a model has numbers
POOL = ["--pool-facts", 10, "--pool-talk", 3, "--replied", 3, "--pool-general", 4, "--pages", 2]


def test_a_memory_is_trained_for_a_plain_gpt2_by_its_name(tmp_path, small_books):
    base, tokenizer = talking_base("gpt2"), talking_tokenizer("gpt2")
    assert type(base).__name__ == "GPT2LMHeadModel" and not tokenizer.chat_template
    base.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    run = CliRunner().invoke

    where = ["--model", tmp_path / "gpt2", "--out", tmp_path / "memory"]
    result = run(app, ["train", *map(str, [*where, "--books", small_books, *POOL, *LITTLE])])
    assert result.exit_code == 0, result.output

    model = GPT2WithGRUMemory.from_pretrained_with_memory(tmp_path / "gpt2", memory=tmp_path / "memory")
    assert model.memory_config.key_layers == (0, 1, 2) and model.memory_config.address_rank == 160
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    ids = torch.tensor([tokenizer("User: My boat is called Marigold.\n")["input_ids"]])
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, base(ids).logits)

    asked = ["--model", tmp_path / "gpt2", "--memory", tmp_path / "memory", "--out", tmp_path / "results"]
    little = ["--facts", 1, "--between", 1, "--sessions", 2, "--max-new-tokens", 2]
    result = run(app, ["eval", "recall", *map(str, [*asked, *little])])
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "results" / "recall.json").read_text())["results"]
    assert found["memory"]["total"] == 2
