"""Two processes, started by `accelerate launch`, have the curves and the memory of one: DDP and FSDP2, gloo, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from postgres import free_port
from safetensors.torch import load_file
from talking import talking_model, talking_tokenizer
from transformers import LlamaForCausalLM

TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
HOW = {
    "one": [sys.executable],
    "ddp": [*LAUNCH, *TWO],
    "fsdp2": [*LAUNCH, "--config_file", str(EXAMPLES / "fsdp2.yaml"), str(TESTS / "fsdp_on_cpu.py")],
}
MANY = ("ddp", "fsdp2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def start(how: str, *arguments: str) -> str:
    command, port = HOW[how], free_port()
    if how != "one":
        command = [*command[:4], "--main_process_port", str(port), *command[4:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """how -> what tests/distributed_runs.py found."""
    found = {}
    for how in HOW:
        folder = tmp_path_factory.mktemp(how)
        start(how, str(TESTS / "distributed_runs.py"), str(folder))
        found[how] = {
            **json.loads((folder / "runs.json").read_text()),
            "memory": load_file(memory_file(folder / "memory")),
        }
    return found


def memory_file(folder: Path) -> Path:
    return folder / "memory_model.safetensors"


def test_these_are_what_they_are_called(runs):
    assert {how: (run["processes"], run["sharded"]) for how, run in runs.items()} == {
        "one": (1, False),
        "ddp": (2, False),
        "fsdp2": (2, True),
    }


@pytest.mark.parametrize("how", MANY)
@pytest.mark.parametrize("run", ["plain", "truncated"])
def test_two_processes_have_the_curve_of_one(runs, how, run):
    assert runs[how][run] == pytest.approx(runs["one"][run], rel=2e-5)
    assert runs["one"]["plain"] != pytest.approx(runs["one"]["truncated"], rel=1e-3)


@pytest.mark.parametrize("how", HOW)
def test_resumed_runs_have_the_curve_of_uninterrupted_ones(runs, how):
    assert runs[how]["resumed"] == pytest.approx(runs["one"]["plain"], rel=2e-5)


@pytest.mark.parametrize("how", MANY)
def test_two_processes_evaluate_and_save_as_one(runs, how):
    assert runs[how]["evaluation"] == pytest.approx(runs["one"]["evaluation"], rel=1e-4)
    wanted = runs["one"]["memory"]
    assert set(runs[how]["memory"]) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            runs[how]["memory"][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    config = talking_model("llama").config
    del config.gru_memory
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    talking_tokenizer("llama").save_pretrained(folder)
    return folder


def test_the_launches_in_the_documents_train_one_memory(tiny, tmp_path):
    """examples/trainer.py as docs/training.md starts it."""
    losses, memories = {}, {}
    for how in HOW:
        out = tmp_path / how
        said = start(how, str(EXAMPLES / "trainer.py"), "--model", str(tiny), "--steps", "3", "--out", str(out))
        losses[how] = [line.split("'")[3] for line in said.splitlines() if line.startswith("{'loss'")]
        memories[how] = load_file(memory_file(out))
    assert len(losses["one"]) == 3
    for how in MANY:
        assert [float(x) for x in losses[how]] == pytest.approx(
            [float(x) for x in losses["one"]], abs=2e-3
        )  # as printed
        for name, tensor in memories["one"].items():
            torch.testing.assert_close(memories[how][name], tensor, rtol=1e-3, atol=1e-4)
