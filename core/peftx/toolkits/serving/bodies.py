"""What clients send: OpenAI's requests, field by field. What this server does not do is refused, not ignored; a field
that is null, or as it would be anyway, asks for nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from peftx.engines.data.messages import render_messages
from peftx.toolkits.serving.job import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_STOPS = 4  # as OpenAI
MOST_CHOICES = 16
MOST_LOGPROBS = 20
MOST_PROMPTS = 2048
SEVERAL = Field(min_length=1, max_length=MOST_PROMPTS)
ASIDE = "\nUser:"
"""Where a model without a chat template is in the other speaker's turn."""

Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[TokenKey, Bias], Field(max_length=1024, json_schema_extra={"additionalProperties": False})
]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
AT_DEFAULT_ALONE = ("suffix", "tool_choice", "parallel_tool_calls", "dimensions")
"""Fields whose other values this server does not know."""


STRICT = ConfigDict(extra="forbid", strict=True)
"""A number in quotes is no number."""


class Body(BaseModel):
    """A request."""

    model_config = STRICT
    model: str | None = None
    """The first one where none is named."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        """As OpenAI reads them: null is "not given"."""
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if value is not None or name not in cls.model_fields
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Said in the schema too: what need not be given may be null."""
        found: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        for name in found["properties"].keys() - set(found.get("required", ())):
            given = found["properties"][name]
            if {"type": "null"} not in given.get("anyOf", ()) and given.get("type") != "null":
                found["properties"][name] = {"anyOf": [given, {"type": "null"}]}
        return found


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = STRICT
    include_usage: bool = False


class NamedSchema(BaseModel):
    """A JSON schema; it is held to whether `strict` or not."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    strict: bool | None = None
    told: dict[str, Any] = Field({"type": "object", "additionalProperties": True}, alias="schema")


class ResponseFormat(BaseModel):
    """What the answer is to look like."""

    model_config = STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseFormat:
        if (self.json_schema is not None) is not (self.type == "json_schema"):
            raise ValueError("json_schema is given where the type is json_schema, and only there")
        _ = self.text
        return self

    @property
    def text(self) -> str:
        """The schema as JSON; empty where an answer may be anything. Raises ValueError where it is none."""
        if self.type == "text":
            return ""
        if self.json_schema is None:
            return '{"type": "object", "additionalProperties": true}'
        return json.dumps(self.json_schema.told, allow_nan=False)


class Sampled(Body):
    """What completions and chats have in common."""

    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    user: str | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = Field(default_factory=dict)

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def asking(self, max_tokens: int | None, **more: Any) -> list[Request]:
        """A request for each choice: n of one prompt, with seeds that follow each other."""
        return [
            Request(
                **{"stop": self.stops, **more},
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=None if self.seed is None else self.seed + index,
                stream=self.stream,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                schema="" if self.response_format is None else self.response_format.text,
                logit_bias=tuple(sorted((int(id), bias) for id, bias in self.logit_bias.items())),
            )
            for index in range(self.n)
        ]


def _sole(value: object) -> object:
    """Of several prompts as ids, or as text, a list; a prompt alone is a list of one."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [value]
    return value


class CompletionBody(Sampled):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[Text | Ids],
        SEVERAL,
        BeforeValidator(_sole, json_schema_input_type=Text | Ids | Annotated[list[Text | Ids], SEVERAL]),
    ]
    max_tokens: int = Field(16, ge=0)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 writes nothing, which is of use with echo alone")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError("best_of is less than n")
        if self.stream and (self.best_of or 1) > self.n:
            raise ValueError("best_of cannot be streamed")
        if self.stream and self.echo:
            raise ValueError("echo is not streamed by this server")
        return self

    def requests(self) -> list[list[Request]]:
        """Those of each prompt."""
        wanted = self.model_copy(update={"n": max(self.n, self.best_of or 1)})
        scored = self.logprobs is not None or wanted.n > self.n
        more = {"logprobs": self.logprobs or 0} if scored else {}
        return [
            wanted.asking(self.max_tokens, echo=self.echo, **more, **_prompt(prompt))
            for prompt in self.prompt
        ]


def _prompt(prompt: str | list[int]) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt": "", "ids": tuple(prompt)}


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message without content")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        parts = self.content if isinstance(self.content, list) else []
        found: dict[str, Any] = self.model_dump(exclude_none=True)
        found["content"] = "".join(part.text for part in parts) if parts else self.content
        found["role"] = "system" if self.role == "developer" else self.role
        return found


class ChatBody(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _goes_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """One for each choice; the prompt asks for the assistant's turn.

        Raises:
            DataError: the chat template refuses the conversation. UnsupportedError: tools without a template.
        """
        messages = [message.plain() for message in self.messages]
        tools = self.tools if self.tool_choice != "none" else None
        chat = tokenizer.chat_template is not None
        more: dict[str, Any] = {"prompt": render_messages(tokenizer, messages, tools=tools), "rendered": chat}
        if not chat:
            more |= {"stop": (*self.stops, ASIDE), "trim": True}
        if self.logprobs:
            more["logprobs"] = self.top_logprobs or 0
        return self.asking(self.max_completion_tokens or self.max_tokens, **more)


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`."""

    input: Annotated[
        list[Text],
        SEVERAL,
        BeforeValidator(_sole, json_schema_input_type=Text | Annotated[list[Text], SEVERAL]),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None


class TokenizeBody(BaseModel):
    """`POST /tokenize`, as vLLM has it."""

    model_config = STRICT
    prompt: str
    model: str | None = None


class DetokenizeBody(BaseModel):
    """`POST /detokenize`."""

    model_config = STRICT
    tokens: Annotated[list[TokenId], Field(max_length=100_000)]
    model: str | None = None


Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.-]+$")]


class LoadBody(BaseModel):
    """`POST /v1/load_lora_adapter`, as vLLM has it."""

    model_config = STRICT
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=1000)]


class UnloadBody(BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    model_config = STRICT
    lora_name: Name
