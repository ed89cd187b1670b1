"""Sizes are those of real conversations, and the page counts them up without a slip."""

import re

import pytest
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation
from gru_memory.bench.sizing import MESSAGE, TURNS, Sizes, measure, render
from gru_memory.evaluation.full_history import kv_bytes_per_token


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


def test_sizes_are_measured_on_conversations(loaded):
    sizes = measure(*loaded, batch=4, sessions=12)
    conversation = Conversation(*loaded)
    conversation.read(MESSAGE)
    assert abs(sizes.state - len(conversation.to_bytes())) < 200  # counters and the text in sight differ
    assert sizes.stored > TURNS * sizes.state
    assert sizes.stored >= sizes.stored_last > sizes.state
    assert sizes.history == TURNS * sizes.tokens * kv_bytes_per_token(loaded[0])
    assert 0 < sizes.together < sizes.alone
    assert sizes.commit > 0


def test_the_page_counts_up():
    sizes = Sizes(30_000, 300_000.0, 50_000.0, 25_000_000, 60, 0.9, 0.29, 0.01, 16)
    page = render(sizes, "a model")
    assert "| memory, as it is kept | 30.0 KB | 30.0 MB | 30.0 GB |" in page
    assert "| 300 ms | 5.0 min | 83.3 h |" in page  # 0.29 + 0.01 s, a thousand and a million times
    assert "288,000 turns a day" in page
    assert "1,000,000 need 35 cores" in page


def test_the_page_in_the_documents_is_one_of_this_command(repository):
    def form(text):
        return re.sub(r"[\d.,]+ ?(bytes|KB|MB|GB|TB|ms|min|s|h|days|cores?)?\b", "#", text)

    written = (repository / "docs" / "sizing.md").read_text()
    wanted = render(Sizes(1, 1, 1, 1, 1, 1, 1, 1, 16), "X").splitlines()
    rows = [line for line in wanted if line.startswith(("|", "#", "- **"))]
    assert [form(line) for line in written.splitlines() if line.startswith(("|", "#", "- **"))] == list(map(form, rows))
