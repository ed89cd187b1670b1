"""A LoRA and a memory on one frozen model: train both, save both, load both (pip install peft).

    python examples/lora_and_memory.py [--model smollm2] [--steps 4]

The two stay apart: the adapter is peft's, in a folder of its own, and the memory in another.
"""

import argparse
import tempfile
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from gru_memory import Conversation, MemoryConfig, add_memory
from gru_memory.data import FactGenerator
from gru_memory.embedded import load_model
from gru_memory.training.checkpoints import MemoryCheckpoints
from gru_memory.training.collator import SessionCollator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="'smollm2', a folder, a .gguf file or a hub name")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()

    set_seed(0)
    base, tokenizer = load_model(arguments.model)
    model = add_memory(
        base, MemoryConfig(sites=("top",), decay=0.998, decay_every="turn", cell="mingru", gate_init=1.0)
    )
    # Adapters go to the base model alone: with target_modules="all-linear", say exclude_modules=r".*gru_memory.*".
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for parameter in model.memory_parameters():  # peft has frozen all but its own
        parameter.requires_grad_(True)
    model.print_trainable_parameters()

    rng, facts = Random(0), FactGenerator(0)
    sessions = [facts.session(num_facts=1, between=rng.randrange(2)) for _ in range(16)]
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=arguments.steps,
            use_cpu=not torch.accelerator.is_available(),
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(
            model=adapted,
            args=settings,
            train_dataset=sessions,
            data_collator=SessionCollator(tokenizer),
            callbacks=[MemoryCheckpoints()],  # the Trainer's own checkpoints of a peft model hold the adapter alone
        ).train()

        adapter, memory = Path(scratch, "adapter"), Path(scratch, "memory")
        adapted.save_pretrained(adapter)
        model.save_memory(memory)

        base = adapted.unload()  # the base model again, without the adapter
        again = PeftModel.from_pretrained(base, adapter)
        again.get_base_model().load_memory(memory)
        again.eval()
        talk = Conversation(again.get_base_model(), tokenizer, max_new_tokens=12)
        talk.read("My boat is called Marigold.")
        print(talk.say("What is my boat called?"))


if __name__ == "__main__":
    main()
