"""What of OpenAI's chat API is served: the fields, their checks, and errors in its form."""

import json
from typing import Annotated, Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
    """An answer in OpenAI's error JSON: a bad request (4xx), or an upstream that failed (502)."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "upstream_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def unreachable(cls, error: httpx.HTTPError) -> "ApiError":
        return cls(f"the vLLM server behind this one failed ({type(error).__name__}: {error}); try again", status=502)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """null is the default, as in OpenAI's API."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


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
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: NonNegative = 0.0
    trace_temperature: NonNegative | None = None
    top_p: float = Field(1.0, gt=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    stop: list[Annotated[str, Field(min_length=1)]] = []
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
