"""A memory of your own: a module with the same signature as the library's, hooked in, used, saved and loaded.

    python examples/custom_site.py

`FadingAverage` keeps one decaying average of what was said and adds a projection of it to the hidden states. The base model is a
tiny Llama with random weights, so that this runs anywhere in seconds; put any causal LM in its place.
"""

import tempfile

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gru_memory import AutoModelWithGRUMemory, MemoryConfig, add_memory, register_site

VOCABULARY, WIDTH = 100, 32


class FadingAverage(nn.Module):
    """a_t = decay a_{t-1} + (1 - decay) e_t, and y_t = x_t + W a_t, with e the output embeddings."""

    def __init__(self, width: int, decay: float) -> None:
        super().__init__()
        self.width, self.decay = width, decay
        self.output = nn.Linear(width, width, bias=False)

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state of conversations in which nothing was said yet: tensors whose first dimension is the batch."""
        weight = self.output.weight
        return {"average": torch.zeros(batch_size, self.width, dtype=weight.dtype, device=weight.device)}

    def forward(
        self,
        hidden_states: Tensor,  # (B, T, D) the stream at this site
        token_embeds: Tensor
        | None,  # (B, T, D) rows of the LM head; None for a prompt of embeddings that are not tied to it
        state: dict[str, Tensor],  # what this returned for the tokens before
        mask: Tensor,  # (B, T) bool; where it is False the state must stay as it is
        turn_starts: Tensor,  # (B, T) bool, the first token of each turn, for memories that fade by turns
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = hidden_states if token_embeds is None else token_embeds
        average, averages = state["average"], []
        for t in range(tokens.shape[1]):
            new = self.decay * average + (1 - self.decay) * tokens[:, t]
            average = torch.where(mask[:, t, None], new, average)  # (B, D)
            averages.append(average)
        return hidden_states + self.output(torch.stack(averages, dim=1)), {"average": average}

    def site_config(self) -> dict[str, float]:
        """The arguments that make another one like this: with them in its config a saved model makes its own sites."""
        return {"width": self.width, "decay": self.decay}


register_site("fading average", FadingAverage)


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    torch.manual_seed(0)
    # One site of the library's, and one of ours.
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    model = add_memory(tiny_model(), config, sites={"top": FadingAverage(WIDTH, decay=0.9)})
    model.print_trainable_parameters()

    # Whole sequence = any chunks, with the state handed on.
    ids = torch.randint(1, VOCABULARY, (2, 12))
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)  # the cache carries the memory, too
    chunks = torch.cat([first.logits, second.logits], dim=1)
    print(f"whole against chunks: logits differ by {(whole.logits - chunks).abs().max():.1e}")

    # Beams carry their own memory, and generate() commits that of the beam it returns.
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False)
    print(f"after generate(): {model.memory_state.tokens.tolist()} tokens in memory")

    # It learns like any module: only the memory has gradients.
    optimizer = torch.optim.AdamW(model.memory_parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss on one batch: {losses[0]:.2f}, after {len(losses)} steps {losses[-1]:.2f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelWithGRUMemory.from_pretrained(folder)
    same = torch.equal(loaded(ids).logits, model(ids).logits)
    print(f"loaded: {type(loaded.memory_sites()['top']).__name__}, the same logits: {same}")


if __name__ == "__main__":
    main()
