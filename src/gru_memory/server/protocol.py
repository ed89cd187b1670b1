"""What clients may send. A field that is not here, or a value that would have to be ignored, is refused."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..store.settings import MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE, check_metadata, check_strings

MAX_TEXT = 262_144  # characters of one message
MAX_MESSAGES = 2_000


def _keepable(text: str) -> str:
    """Raise ValueError for a text that no database keeps, before a model works on it in vain."""
    check_strings(text, "the text")
    return text


Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_keepable)]
Id = Annotated[str, Field(min_length=1, max_length=200)]
User = Annotated[str, Field(min_length=1, max_length=195)]  # its session's name is 5 characters longer
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=MAX_METADATA_KEY)], Annotated[str, Field(max_length=MAX_METADATA_VALUE)]],
    Field(max_length=MAX_METADATA),
    AfterValidator(check_metadata),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class TextPart(_Strict):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    logprobs: Annotated[list[Any], Field(max_length=0)] = []


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=64)]
    type: Literal["message"] = "message"
    id: Annotated[str, Field(max_length=200)] | None = None  # of an output item that is sent back
    status: Literal["completed", "incomplete", "in_progress"] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Format(_Strict):
    type: Literal["text"]


class _TextConfig(_Strict):
    format: _Format | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Sampled(_Strict):
    model: Annotated[str, Field(max_length=500)]
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    user: User | None = None
    session_id: Id | None = None

    @property
    def heat(self) -> float:
        """The temperature: 0, which takes the likeliest token, unless one is given, or a `top_p`, which asks for a draw."""
        return self.temperature if self.temperature is not None else float(self.top_p < 1)


class ChatRequest(_Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    n: Annotated[int, Field(ge=1, le=1)] = 1
    logprobs: Literal[False] = False
    response_format: _Format | None = None
    store: Literal[False] = False
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> ChatRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options are those of a stream: leave them out, or set stream")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say two different things: give one of them")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class ConversationRef(_Strict):
    id: Id


class ResponseRequest(_Sampled):
    input: Text | Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    previous_response_id: Id | None = None
    conversation: Id | ConversationRef | None = None
    store: bool = True
    metadata: Metadata | None = None
    include: Annotated[list[Any], Field(max_length=0)] = []
    text: _TextConfig | None = None
    truncation: Literal["disabled"] = "disabled"
    tools: Annotated[list[Any], Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    background: Literal[False] = False

    @model_validator(mode="after")
    def _one_memory(self) -> ResponseRequest:
        if self.conversation and self.previous_response_id:
            raise ValueError("conversation and previous_response_id say two different things: give one of them")
        return self

    @property
    def conversation_name(self) -> str | None:
        return self.conversation.id if isinstance(self.conversation, ConversationRef) else self.conversation

    @property
    def messages(self) -> list[Message]:
        given = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        head = [Message(role="system", content=self.instructions)] if self.instructions else []
        return [*head, *given]


class ConversationRequest(_Strict):
    items: Annotated[list[Message], Field(max_length=20)] = []
    metadata: Metadata = {}


class ItemsRequest(_Strict):
    items: Annotated[list[Message], Field(min_length=1, max_length=20)]


class MetadataRequest(_Strict):
    metadata: Metadata = {}


class ForkRequest(_Strict):
    name: Id
    at: Id | None = None


class ForgetRequest(_Strict):
    text: Text | None = None
    reply: Text | None = None  # to that text: what it wrote goes, too
    head: Annotated[int, Field(ge=0)] | None = None
    slot: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ForgetRequest:
        if (self.text is None) == (self.head is None) or (self.head is None) != (self.slot is None):
            raise ValueError("say what to forget: text, or head and slot")
        if self.reply is not None and self.text is None:
            raise ValueError("a reply is forgotten with the message it answered: give its text as well")
        if self.text is not None and not self.text.strip():
            raise ValueError("the text to forget is empty: give a message word for word")
        return self


class DecayRequest(_Strict):
    ticks: Annotated[float, Field(ge=0, le=1_000_000)]


class TextRequest(_Strict):
    text: Text


def split(messages: list[Message], history: bool = True) -> tuple[str | None, list[tuple[str, str | None]], str]:
    """System prompt, earlier turns and the new message.

    Args:
        messages: what a client sent.
        history: it may be a history, which may have its beginning cut off: messages of the assistant that it begins with, a
            greeting for example, answer nothing and are left out.

    Raises:
        ValueError: messages in an order that is no conversation.
    """
    turns = turns_of(messages, history)
    if not turns or turns[-1][1] is not None:
        raise ValueError("the last message must be the user's")
    return system_of(messages), turns[:-1], turns[-1][0]


def conversation_of(messages: list[Message]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """System prompt and turns of messages that nothing is to be answered to.

    Raises:
        ValueError: messages in an order that is no conversation, or a system prompt alone, which nothing would keep.
    """
    system, turns = system_of(messages), turns_of(messages)
    if system is not None and not turns:
        raise ValueError(
            "a system prompt is kept with what a user said, and there is no such message: add one, or send the prompt as "
            "`instructions` of the next response"
        )
    return system, turns


def system_of(messages: list[Message]) -> str | None:
    """The system prompt, if there is one."""
    return "\n".join(message.text for message in messages if message.role in ("system", "developer")) or None


def turns_of(messages: list[Message], history: bool = False) -> list[tuple[str, str | None]]:
    """What users said and, where they got one, the reply; of a `history` without what the assistant said before that.

    Raises:
        ValueError: messages in an order that is no conversation.
    """
    rest = [message for message in messages if message.role in ("user", "assistant")]
    if history:
        rest = list(itertools.dropwhile(lambda message: message.role == "assistant", rest))
    turns: list[tuple[str, str | None]] = []
    for message in rest:
        if message.role == "user":
            if not message.text.strip():
                raise ValueError("a message of role 'user' is empty")
            turns.append((message.text, None))
        elif not turns or turns[-1][1] is not None:
            raise ValueError("a message of the assistant must follow one of the user's, in the same request")
        else:
            turns[-1] = (turns[-1][0], message.text)
    return turns
