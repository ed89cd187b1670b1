"""What tests of training share: a tiny model, a token a letter, facts, the cache of hidden states, and a memory."""

import pytest
import torch
from talking import TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gru_memory import backbones
from gru_memory.data.facts import FactGenerator, FactPool
from gru_memory.memory import GRUMemoryWithDecay
from gru_memory.rendering import TurnRenderer
from gru_memory.training.features import PREFIX, build_feature_cache
from gru_memory.training.rows import turn_text

KEY_LAYERS = (1,)
SHAPE = {"num_heads": 2, "num_slots": 4, "slot_size": 8, "decay": 0.9, "decay_every": "turn"}


@pytest.fixture(scope="module", name="tokenizer")
def tokenizer_of_letters():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module", name="model")
def small_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", name="pool")
def facts_and_talk():
    short = FactGenerator(0, corrected=0.3, accept=lambda value: len(value) < 12)
    return FactPool(short, num_facts=12, num_talk=6, tells=1, asks=1)


@pytest.fixture(scope="module", name="build")
def cache_of_turns(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")

    def build(turns):
        texts = [PREFIX, *dict.fromkeys(turn_text(turn) for turn in turns)]
        norm, blocks = backbones.before_head_of(model), backbones.blocks_of(model)
        return build_feature_cache(folder, model, norm, blocks, TurnRenderer(tokenizer), texts, KEY_LAYERS, "tiny")

    return build


def make_memory(gate=2.0, cell="mingru", **form):
    torch.manual_seed(1)
    return GRUMemoryWithDecay(32, **SHAPE, cell=cell, gate_init=gate, key_size=32 * len(KEY_LAYERS), **form)
