"""What of OpenAI's chat API is served: the fields, their checks, and errors in its form."""

import json
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from abscot_trl.errors import Refused

# Fields of the chat API that would change what an answer means, and the values at which they do not.
NEUTRAL = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
}
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class ApiError(Exception):
    """An answer in OpenAI's error JSON: a bad request (4xx), an upstream that failed (502, 504), or our end (503)."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def failed(cls, how: str, status: int = 502) -> "ApiError":
        return cls(f"the vLLM server behind this one failed ({how:.300}); try again, or see its log", status=status)

    @classmethod
    def unreachable(cls, error: httpx.HTTPError) -> "ApiError":
        if isinstance(error, httpx.ReadTimeout):
            return cls.failed("not a word within `timeout`; ask for less, or serve with a longer one", 504)
        return cls.failed(f"{type(error).__name__}: {error}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """null is the default, as in OpenAI's API. One unknown field is enough to refuse: a million take seconds."""
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys()
        given = {name: value for name, value in values.items() if value is not None}
        unknown = next((name for name in given if name not in known), None)
        return {name: value for name, value in given.items() if name in known or name == unknown}


class Message(_Strict):
    """One turn. `reasoning_content` of earlier replies is accepted and dropped: training saw no earlier traces."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: str = ""

    @field_validator("content", mode="before")
    @classmethod
    def _text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        if not all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
        ):
            raise Refused("only parts of type 'text' are supported; send text")
        return "".join(part["text"] for part in content)


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """What of OpenAI's chat API means the same here, and `trace_temperature`. `user` and `metadata` are ignored."""

    model: str | None = None
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: NonNegative = 0.0
    trace_temperature: NonNegative | None = None
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], FailFast()] = Field([], max_length=16)
    seed: int | None = Field(None, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Any = None
    metadata: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Choice(BaseModel):
    """What is read of a choice in vLLM's reply; `token_ids` where they were asked for."""

    text: str
    finish_reason: str | None
    token_ids: list[int] | None = None


class Usage(BaseModel):
    completion_tokens: int


class Completion(BaseModel):
    """What is read of vLLM's reply, and of an event of its stream: the last one has the usage and no choice."""

    choices: list[Choice]
    usage: Usage | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "Completion":
        if not self.choices and self.usage is None:
            raise Refused("neither choices nor usage")
        return self


def _words(error: dict) -> ApiError:
    """A validation error in one sentence: field, value, remedy."""
    name = ".".join(map(str, error["loc"]))
    value = f"{error['input']!r:.100}"
    if error["type"] == "missing":
        return ApiError(f"{name} is missing; give it", name)
    if error["type"] == "extra_forbidden":
        return ApiError(f"{name}: {value} is not supported here; leave it out", name)
    return ApiError(f"{name}: {value}: {error['msg'].removeprefix('Value error, ')}", name)


def parse_request(body: bytes) -> ChatRequest:
    """
    Raises:
        ApiError: not JSON, an unknown field, a value of another type or range, or one that asks for what is not there.
    """
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and no text
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON ({error}); send a JSON object") from error
    if not isinstance(fields, dict):
        raise ApiError(f"the body is a JSON {type(fields).__name__}; send a JSON object")
    for name in NEUTRAL.keys() & fields.keys():
        if fields[name] is not None and fields[name] not in NEUTRAL[name]:
            raise ApiError(f"{name}: {fields[name]!r:.100} is not supported by this server; leave it out", name)
    try:
        request = ChatRequest.model_validate({k: v for k, v in fields.items() if k not in NEUTRAL})
    except ValidationError as error:
        raise _words(error.errors()[0]) from error
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
        values = f"{request.max_tokens} and {request.max_completion_tokens}"
        raise ApiError(f"max_tokens and max_completion_tokens differ, {values}; give one of them", "max_tokens")
    return request
