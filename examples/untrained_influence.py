"""How loudly an untrained memory speaks, by its gate: KL to the base model, loss, and next tokens that change.

    python examples/untrained_influence.py [--model smollm2] [--gates 0 0.1 1]

Prints the table of which docs/memory.md shows some rows. The text is a dozen unrelated chat turns from the library's own generator.
"""

import argparse
from random import Random

import torch

from gru_memory import MemoryConfig, add_memory
from gru_memory.data.small_talk import sample_talk
from gru_memory.embedded import load_model

SITES = (("input", "middle", "top"), ("top",))
GATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--gates", type=float, nargs="+", default=GATES)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    rng = Random(0)
    turns = [sample_talk(rng, "test") for _ in range(12)]
    ids = tokenizer("\n".join(f"{turn.user}\n{turn.assistant}" for turn in turns), return_tensors="pt")["input_ids"]
    base = model(ids).logits.log_softmax(-1)[0]
    print(f"{ids.shape[1]} tokens\n{'sites':22}{'gate':>6}{'mean KL':>10}{'median KL':>11}{'loss':>8}{'changed':>9}")
    for sites in SITES:
        for gate in arguments.gates:
            torch.manual_seed(0)
            model = add_memory(model, MemoryConfig(sites=sites, gate_init=gate))
            log_p = model(ids).logits.log_softmax(-1)[0]
            kl = (base.exp() * (base - log_p)).sum(-1)
            loss = -log_p[:-1].gather(1, ids[0, 1:, None]).mean()
            changed = (base.argmax(-1) != log_p.argmax(-1)).float().mean()
            print(f"{'+'.join(sites):22}{gate:6.2f}{kl.mean():10.4f}{kl.median():11.4f}{loss:8.3f}{changed:9.1%}")


if __name__ == "__main__":
    main()
