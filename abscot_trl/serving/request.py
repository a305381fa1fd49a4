"""What of OpenAI's chat API is served: the fields, their checks, and errors in its form. README.md has the table."""

import json
from typing import Annotated, Any, ClassVar, Literal

import httpx
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from abscot_trl.errors import Refused
from abscot_trl.traces.vllm import row_seed

MOST_CHOICES = 128  # as OpenAI's
# Who asks, and how a provider would file or cache it: no value of these changes an answer, so all are dropped.
LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options"}
LABELS |= {"prompt_cache_retention"}
# Fields that are not served, and the values that ask for nothing but what is done anyway.
NEUTRAL = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),  # there are none
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": ("medium",),  # OpenAI's default
    "verbosity": ("medium",),
    # of vLLM's, what it does without them
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_reasoning": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
TOOLS = "no tool is called here; leave it out and say in the messages what you want"
ENDS = "an answer ends where the model ends it; leave it out, or give max_tokens or stop"
REMEDIES = {
    "store": "nothing is stored here; leave it out",
    "service_tier": "there is one tier; leave it out",
    **dict.fromkeys(("tools", "tool_choice", "functions", "function_call", "tool_calls"), TOOLS),
    "response_format": "an answer is free text; leave it out and ask for the form in the messages",
    **dict.fromkeys(("modalities", "audio"), "only text is written; leave it out"),
    "reasoning_effort": "a trace is as long as the model makes it; leave it out",
    "verbosity": "leave it out and ask for a length in the messages",
    "prediction": "nothing is drafted here; leave it out",
    "web_search_options": "nothing is searched here; leave it out",
    **dict.fromkeys(("best_of", "use_beam_search", "length_penalty"), "leave it out; n gives several answers"),
    **dict.fromkeys(("min_tokens", "stop_token_ids"), ENDS),
    "chat_template_kwargs": "the checkpoint's template has no switch here; leave it out",
    "name": "the model sees no names; leave it out or write it into the content",
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
    neutral: ClassVar[dict[str, tuple]] = {}

    @classmethod
    def _says_nothing(cls, name: str, value: Any) -> bool:
        """null is the default, as in OpenAI's API. `1` and `True` are equal, and not the same."""
        return value is None or any(type(value) is type(v) and value == v for v in cls.neutral.get(name, ()))

    @model_validator(mode="before")
    @classmethod
    def _with_a_meaning(cls, values: Any) -> Any:
        """Without what says nothing. One unknown field is enough to refuse: a million take seconds."""
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys()
        given = {name: value for name, value in values.items() if not cls._says_nothing(name, value)}
        unknown = next((name for name in given if name not in known), None)
        return {name: value for name, value in given.items() if name in known or name == unknown}


class Message(_Strict):
    """One turn. `reasoning_content` of earlier replies is accepted and dropped: training saw no earlier traces."""

    # what older versions of lm_eval send with each message, and what a reply's message holds when it is sent back
    neutral: ClassVar[dict[str, tuple]] = {"type": ("text",), "tool_calls": ([],), "annotations": ([],)}
    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: str = ""
    reasoning: str = ""

    @field_validator("role", mode="before")
    @classmethod
    def _developer(cls, role: Any) -> Any:
        """OpenAI's newer name."""
        return "system" if role == "developer" else role

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
    neutral: ClassVar[dict[str, tuple]] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
    include_usage: bool = False


class ChatRequest(_Strict):
    """
    What of OpenAI's chat API means the same here, four of vLLM's sampling fields, and `trace_temperature`.

    From `temperature` to `top_logprobs` they are of the answer: the trace is drawn under its constraint.
    """

    neutral: ClassVar[dict[str, tuple]] = NEUTRAL
    model: str | None = None
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    trace_temperature: NonNegative | None = None
    temperature: NonNegative = 0.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], FailFast()] = Field([], max_length=16)
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    seed: int | None = Field(None, ge=0)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("n")
    @classmethod
    def _not_too_many(cls, n: int) -> int:
        if n > MOST_CHOICES:
            raise Refused(f"at most {MOST_CHOICES} choices a request; send several, each with a seed of its own")
        return n

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def limit(self) -> int | None:
        """Tokens of a choice, trace and answer. The newer name wins, as in vLLM: lighteval sends both."""
        return self.max_completion_tokens or self.max_tokens

    def seed_of(self, choice: int, call: int) -> int | None:
        """Of a choice's trace (call 0) or answer (1): its own, and choice 0's are those of `n` 1."""
        return None if self.seed is None else row_seed(self.seed, call, choice)


def _words(error: dict) -> ApiError:
    """A validation error in one sentence: field, value, remedy."""
    name = ".".join(map(str, error["loc"]))
    value = f"{error['input']!r:.100}"
    if error["type"] == "missing":
        return ApiError(f"{name} is missing; give it", name)
    if error["type"] == "extra_forbidden":
        return ApiError(f"{name}: {value} is not supported: {REMEDIES.get(error['loc'][-1], 'leave it out')}", name)
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
    try:
        request = ChatRequest.model_validate({name: fields[name] for name in fields if name not in LABELS})
    except ValidationError as error:
        raise _words(error.errors()[0]) from error
    if request.top_logprobs and not request.logprobs:
        raise ApiError(f"top_logprobs: {request.top_logprobs} needs logprobs; set it to true", "top_logprobs")
    return request
