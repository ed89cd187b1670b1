"""Tiny models that can be talked to: tokenizers made on the spot, with and without a chat template."""

from functools import cache

import torch
from tiny import wake
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gru_memory import MemoryConfig, add_memory

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>system: be kind</s>\n{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TEXT = ["My boat is called Marigold. What is my boat called? Where do you live? I live in Porto. User: Assistant: "] * 3
FAMILIES = ("gpt2", "llama")
POSITIONS = 384


@cache
def talking_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens. Llama's has a chat template with a system prompt, GPT-2's has none."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    if family == "llama":
        tokens |= {"pad_token": "</s>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **tokens)


def talking_base(family: str) -> PreTrainedModel:
    """A tiny model for that tokenizer, without a memory."""
    size = len(talking_tokenizer(family))
    torch.manual_seed(0)
    if family == "gpt2":
        shape = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 3, "n_head": 2, "initializer_range": 0.2}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        base = GPT2LMHeadModel(GPT2Config(vocab_size=size, bos_token_id=0, eos_token_id=1, **shape, **dropout))
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        tokens = {"vocab_size": size, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": POSITIONS}
        base = LlamaForCausalLM(LlamaConfig(**tokens, **shape, initializer_range=0.2))
    return base.eval()


def talking_model(family: str, **config) -> PreTrainedModel:
    """The same in float64, with an open memory that addresses by a middle layer too."""
    memory = {"num_heads": 2, "num_slots": 4, "slot_size": 8, "cell": "mingru", "decay": 0.9, "decay_every": "turn"}
    return wake(add_memory(talking_base(family), MemoryConfig(**{**memory, "key_layers": (1,), **config}))).double()
