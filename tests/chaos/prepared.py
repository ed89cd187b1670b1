"""The model of every victim, made once in the process that they are forked from, and run once to load what that takes."""

import torch

from gru_memory import Conversation

from .victim import tiny

torch.set_num_threads(1)  # threads do not survive a fork
LOADED = tiny()
Conversation(*LOADED, max_new_tokens=2).say("Hello.")
