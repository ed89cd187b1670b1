"""What one process, DDP and FSDP2 must agree on: run by tests/test_distributed.py, by itself and through accelerate.

distributed_runs.py OUT    trains in several ways; the first process writes OUT/runs.json, a memory goes to OUT/memory
"""

import json
import os
import sys
from pathlib import Path

import torch
from rows import sessions
from talking import talking_model, talking_tokenizer
from transformers import Trainer, TrainingArguments

from gru_memory.data.sessions import Session
from gru_memory.sharding import has_shards
from gru_memory.training.collator import SessionCollator
from gru_memory.training.truncated import TruncatedTrainer

BATCH, STEPS = 4, 4
# Whole batches, of unequal lengths, so that the processes have unequal numbers of segments.
SESSIONS = [Session(sum((s.turns for s in sessions(11)[i : i + 1 + 2 * (i % 2)]), ())) for i in range(8)]


def run(folder, trainer=Trainer, memory=None, resume=None, options=None, **settings):
    """Train a tiny model; returns the trainer and the losses."""
    model = talking_model("llama", **{"sites": ("input", "middle", "top"), "key_layers": (), **(memory or {})}).float()
    model.freeze_base()
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")), learning_rate=3e-3,
        save_strategy="steps", **{"save_steps": STEPS + 1, **settings},
    )  # fmt: skip
    collate = SessionCollator(talking_tokenizer("llama"))
    run = trainer(model=model, args=arguments, train_dataset=SESSIONS, data_collator=collate, **(options or {}))
    run.train(resume_from_checkpoint=resume)
    return run, [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def runs(out: Path) -> dict:
    found = {}
    trained, found["plain"] = run(out / "plain", save_steps=2)
    found["sharded"], found["processes"] = has_shards(trained.model), trained.args.world_size
    found["evaluation"] = trained.evaluate(SESSIONS[:4])["eval_loss"]
    trained.model.save_memory(out / "memory")
    _, found["resumed"] = run(out / "plain", memory={"gate_init": 5.0}, resume=str(out / "plain" / "checkpoint-2"))
    truncated = {"trainer": TruncatedTrainer, "memory": {"sites": ("middle", "top"), "key_layers": (0,)}}
    _, found["truncated"] = run(out / "truncated", **truncated, options={"segment_tokens": 60})
    return found


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = runs(out)
    if int(os.environ.get("RANK", "0")) == 0:
        (out / "runs.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a process that exits with gloo's threads at work may abort
