"""Turns of any chat template are what the template renders, message and all."""

import copy
from pathlib import Path

import pytest
from talking import talking_tokenizer

from gru_memory.rendering import TurnRenderer

MARKS = ("<|start|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|text|>")
LINE = "{% for m in messages %}"
# A thought before the last reply, and nowhere else.
THOUGHTFUL = (
    LINE + "<|start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# A token of its own at the end of every text, that begins like all others.
CLOSED = (
    LINE + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|text|>{% endif %}"
)
LISTED = LINE + "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"


def tokenizer_of(template):
    tokenizer = copy.deepcopy(talking_tokenizer("llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = template
    return tokenizer


def check(tokenizer, system):
    renderer, head = TurnRenderer(tokenizer, system), [{"role": "system", "content": system}] if system else []
    user, reply = "My boat is called Marigold.", "Lovely."
    messages = [*head, {"role": "user", "content": user}]

    def whole(messages, **settings):
        return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, **settings), add_special_tokens=False)

    asked = whole(messages, add_generation_prompt=True)["input_ids"]
    assert renderer.prefix_ids + renderer.prompt(user) == asked
    told = renderer.prefix_ids + renderer.turn(user, reply).ids
    text = tokenizer.decode(told)
    assert user in text and reply in text
    answered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": reply}], tokenize=False)
    assert text == answered.rstrip("\n") or not answered.startswith(tokenizer.decode(asked))
    assert user not in renderer.prefix_text and user in tokenizer.decode(renderer.prompt(user))


@pytest.mark.parametrize("system", (None, "Be kind."))
@pytest.mark.parametrize("template", (THOUGHTFUL, CLOSED))
def test_templates_that_render_the_last_reply_in_another_way(template, system):
    check(tokenizer_of(template), system)


def test_the_prefix_is_the_system_prompt_and_ends_with_its_last_token():
    assert TurnRenderer(tokenizer_of(THOUGHTFUL), "Be kind.").prefix_text == "<|start|>system\nBe kind.<|end|>\n"
    assert TurnRenderer(tokenizer_of(CLOSED), "Be kind.").prefix_text == "<|system|>\nBe kind.<|end|>\n"
    assert TurnRenderer(tokenizer_of(CLOSED)).prefix_text == ""


def test_a_template_that_drops_the_text_is_refused():
    with pytest.raises(ValueError, match="does not render a message that is a text"):
        TurnRenderer(tokenizer_of(LISTED))


@pytest.mark.parametrize("family", ("qwen3", "phi3", "gemma", "llama3", "qwen2_5", "gptoss", "cohere", "glm4moe"))
def test_templates_of_well_known_models(family):
    trl = pytest.importorskip("trl")
    template = Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja"
    if not template.exists():
        pytest.skip(f"this version of trl has no template of {family}")
    check(tokenizer_of(template.read_text()), None)
