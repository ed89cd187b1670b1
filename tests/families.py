"""A tiny configuration of every family of models, and of the variants of a family that compute something differently."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

VOCABULARY, HIDDEN, LAYERS = 101, 32, 4
PAD, BOS, EOS = 0, 1, 2
WINDOW = 8  # of attention that slides: less than the texts of the tests have

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LOUD = {"initializer_range": 0.2}  # large enough for every token to matter
_SMALL = {
    **_TOKENS,
    **_LOUD,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_GPT2 = {"n_positions": 256, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_OPT = {**_TOKENS, "hidden_size": HIDDEN, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_OPT |= {"max_position_embeddings": 256, "dropout": 0.0, "init_std": 0.2, "word_embed_proj_dim": HIDDEN}
_FALCON = {**_TOKENS, **_LOUD, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}

# row of the compatibility table -> config. A name begins with the model_type.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**_TOKENS, **_LOUD, **_GPT2, attn_pdrop=0.0),
    "gpt_neo": lambda: GPTNeoConfig(
        **_TOKENS,
        **_LOUD,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_layers=LAYERS,
        num_heads=4,
        attention_types=[[["global", "local"], LAYERS // 2]],
        window_size=WINDOW,
        max_position_embeddings=256,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SMALL),
    "gptj": lambda: GPTJConfig(**_TOKENS, **_LOUD, **_GPT2, attn_pdrop=0.0, rotary_dim=4),
    "opt": lambda: OPTConfig(**_OPT),
    "opt, norms after": lambda: OPTConfig(**_OPT, do_layer_norm_before=False),
    "opt, projected": lambda: OPTConfig(**{**_OPT, "word_embed_proj_dim": 24}, do_layer_norm_before=False),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "llama, tied": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=None),
    "mistral, sliding": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": lambda: Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "qwen2, sliding": lambda: Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_GROUPED,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    ),
    "phi": lambda: PhiConfig(**_SMALL),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "phi3, sliding": lambda: Phi3Config(**_GROUPED, sliding_window=WINDOW),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "stablelm": lambda: StableLmConfig(**_GROUPED),
    "stablelm, parallel": lambda: StableLmConfig(
        **_SMALL, num_key_value_heads=4, use_parallel_residual=True, qk_layernorm=True
    ),
    "falcon": lambda: FalconConfig(**_FALCON),
    "falcon, new": lambda: FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, alibi": lambda: FalconConfig(**_FALCON, alibi=True, multi_query=False, parallel_attn=False),
}
