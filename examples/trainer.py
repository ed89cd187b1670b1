"""Train a memory with transformers' own Trainer, in one process or in several.

    python examples/trainer.py [--model smollm2] [--steps 6] [--out folder]
    accelerate launch --num_processes 2 examples/trainer.py ...
    accelerate launch --config_file examples/fsdp2.yaml examples/trainer.py ...

A batch is `--batch` sessions, however many processes share them, so all of these have one loss curve.
"""

import argparse
import os
import tempfile
from random import Random

import torch
from transformers import Trainer, TrainingArguments, set_seed

from gru_memory import MemoryConfig, add_memory
from gru_memory.data import FactGenerator
from gru_memory.embedded import load_model
from gru_memory.training.collator import SessionCollator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="'smollm2', a folder, a .gguf file or a hub name")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2, help="sessions in a step")
    parser.add_argument("--out", help="folder for the memory; none is kept if not given")
    arguments = parser.parse_args()

    set_seed(0)  # every process begins with the same memory
    model, tokenizer = load_model(arguments.model)
    config = MemoryConfig(sites=("top",), decay=0.998, decay_every="turn", cell="mingru", gate_init=1.0)
    model = add_memory(model, config)  # all else is frozen
    model.memory_sites()["top"].match_embeddings(model.get_output_embeddings().weight)

    rng, facts = Random(0), FactGenerator(0)
    sessions = [facts.session(num_facts=1 + rng.randrange(2), between=rng.randrange(2)) for _ in range(64)]
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch // int(os.environ.get("WORLD_SIZE", "1")),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            use_cpu=not torch.accelerator.is_available(),
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=sessions, data_collator=SessionCollator(tokenizer))
        trainer.train()
    if arguments.out:
        model.save_memory(arguments.out)  # on every process: of a sharded memory each of them has a part
    trainer.accelerator.end_training()  # leaves the process group: at exit its threads may still hold tensors


if __name__ == "__main__":
    main()
