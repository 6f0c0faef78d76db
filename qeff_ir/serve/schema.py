"""What requests may ask: each field is checked, ignored because it changes no answer, or refused by its name.

The fields are those of <https://developers.openai.com/api/reference>; ``top_k``, ``min_p``, ``repetition_penalty``,
``stop_token_ids`` and ``ignore_eos`` are extensions by the names that other servers gave them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import from_json

from qeff_ir.serve.errors import ApiError

_HARMLESS = frozenset(
    [
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "service_tier",
        "parallel_tool_calls",
    ]
)
"""Fields that change no answer."""

_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
"""Fields that are not supported, with the values, besides null, that ask for nothing."""

Prompt = str | list[int]


class Body(BaseModel):
    """A request: null is a field that is left out, and a field that is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _wanted(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        return {
            name: value
            for name, value in given.items()
            if value is not None and (name in cls.model_fields or not _asks_nothing(name, value))
        }


def _asks_nothing(name: str, value: Any) -> bool:
    return name in _HARMLESS or any(type(value) is type(v) and value == v for v in _NOTHING.get(name, ()))


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[Prompt]:
    """One text or row of tokens, or several.

    Raises:
        ValueError: It is something else.
    """
    several = isinstance(value, list) and bool(cast("list[Any]", value)) and type(value[0]) is not int
    prompts = cast("list[Any]", value) if several else [value]
    for prompt in prompts:
        tokens = cast("list[Any]", prompt) if isinstance(prompt, list) else [None]
        if not isinstance(prompt, str) and not all(type(token) is int for token in tokens):
            raise ValueError("give a text, token ids, or a list of either")
    return prompts


def _text(value: Any) -> str:
    """A text, or the parts of one.

    Raises:
        ValueError: A part is none of text.
    """
    if isinstance(value, str):
        return value
    parts = cast("list[Any]", value) if isinstance(value, list) else [None]
    texts: list[str] = []
    for part in parts:
        found = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        if found.get("type") != "text" or not isinstance(found.get("text"), str):
            raise ValueError("give a text, or a list of parts of the type text: pictures and sounds are not served")
        texts.append(found["text"])
    return "".join(texts)


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Body):
    """``response_format.json_schema``."""

    name: str
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict[str, Any], alias="schema")
    strict: bool = True


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema: give both, or neither")
        return self


class Generation(Body):
    """What requests for texts have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts), Field(max_length=16)] = []
    stop_token_ids: list[int] = Field([], max_length=256)
    ignore_eos: bool = False
    response_format: ResponseFormat = ResponseFormat(type="text")

    @property
    def alternatives(self) -> int | None:
        """How many log probabilities beside that of each token are wanted; `None` for none at all."""
        raise NotImplementedError


class CompletionRequest(Generation):
    """``POST /v1/completions``."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class Message(Body):
    """One of ``messages``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: give logprobs=true as well")
        return self


class EmbeddingRequest(Body):
    """``POST /v1/embeddings``."""

    model: str
    input: Annotated[list[str], BeforeValidator(_texts), Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


BodyT = TypeVar("BodyT", bound=Body)


def read(kind: type[BodyT], body: bytes) -> BodyT:
    """A request from the bytes of its body.

    Raises:
        ApiError: It is no JSON, or a field is wrong, missing or not known; one sentence names the first.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error}): send a JSON object") from error
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise ApiError(400, _sentence(first["type"], path, first["msg"]), param=path or None) from error


def _sentence(kind: str, path: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"the field {path} is not supported here: leave it out"
    if kind == "missing":
        return f"the field {path} is missing: give it"
    if kind == "value_error":
        return ": ".join(filter(None, (path, message.removeprefix("Value error, "))))
    return f"the {f'field {path}' if path else 'body'} does not fit ({message[:1].lower()}{message[1:]}): correct it"
