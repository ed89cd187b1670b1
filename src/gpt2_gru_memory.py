"""The short import path: `from gpt2_gru_memory import GPT2WithGRUMemory, GRUMemoryWithDecay`."""

from gru_memory import GPT2WithGRUMemory, GRUMemoryWithDecay

__all__ = ["GPT2WithGRUMemory", "GRUMemoryWithDecay"]
