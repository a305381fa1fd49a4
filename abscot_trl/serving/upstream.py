"""What vLLM's completions endpoint answers: its replies and events, checked, and those of several calls at once."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from abscot_trl.errors import Refused
from abscot_trl.serving.request import ApiError

Token = Annotated[str, Field(pattern=r"^token_id:\d{1,9}$")]  # by `return_tokens_as_token_ids`


class Logprobs(BaseModel):
    """
    Of T drawn tokens: ids, natural log-probabilities, and beside each the k likeliest (and itself). Of the policy that
    they were drawn from: after temperature, penalties and truncation (drawn greedily: at temperature 1).
    """

    tokens: list[Token]
    token_logprobs: list[float]
    top_logprobs: list[dict[Token, float]]

    @model_validator(mode="after")
    def _of_one_length(self) -> "Logprobs":
        if not len(self.tokens) == len(self.token_logprobs) == len(self.top_logprobs):
            raise Refused("log-probabilities of other tokens")
        return self

    def as_chat(self, tokenizer: PreTrainedTokenizerBase, stops: list[int], top: int) -> dict:
        """In the chat API's form, without `stops`; `top` likeliest tokens at each place, the likeliest first."""
        content = []
        for token, logprob, others in zip(self.tokens, self.token_logprobs, self.top_logprobs, strict=True):
            if _id(token) not in stops:
                best = sorted(others.items(), key=lambda other: -other[1])[:top]
                tops = [_entry(tokenizer, *other) for other in best]
                content.append(_entry(tokenizer, token, logprob) | {"top_logprobs": tops})
        return {"content": content, "refusal": None}


NO_TOKENS = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[])


def _id(token: Token) -> int:
    return int(token.removeprefix("token_id:"))


def _entry(tokenizer: PreTrainedTokenizerBase, token: Token, logprob: float) -> dict:
    """Text, UTF-8 bytes (`None` for a part of a character) and log-probability."""
    text = tokenizer.decode([_id(token)], clean_up_tokenization_spaces=False)
    return {
        "token": text,
        "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else [*text.encode()],
        "logprob": logprob,
    }


class Choice(BaseModel):
    """What is read of a choice in vLLM's reply; `token_ids` and `logprobs` where they were asked for."""

    text: str
    finish_reason: str | None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None


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


def checked(response: httpx.Response, text: str) -> Completion:
    """The upstream's reply; a bad request in its words, anything else as its failure."""
    if response.is_success:
        with suppress(ValidationError):
            return Completion.model_validate_json(text)
    try:
        words = str(json.loads(text)["error"]["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        words = text
    raise (
        ApiError(f"{words:.1000}")
        if response.status_code == 400
        else ApiError.failed(f"{response.status_code}: {words}")
    )


def check_finish(reason: str | None) -> None:
    """
    Raises:
        ApiError: the upstream broke off.
    """
    if reason not in ("stop", "length"):
        raise ApiError.failed(f"it broke off: {reason}")


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines that end in a newline; httpx's own also end at U+2028 and its like, inside an answer's JSON."""
    rest = b""
    async for part in response.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")


async def together(works: Sequence[Awaitable]) -> list[Any]:
    """The results in order. Once one fails, or this is cancelled, so are the others, and with them the upstream's."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def merged(streams: Sequence[AsyncIterator[Any]]) -> AsyncIterator[Any]:
    """Items (none is `None`) of all streams as they come. They end with it: cancelled, or by the first error."""
    waiting: dict[asyncio.Future, AsyncIterator[Any]] = {}

    def ask(stream: AsyncIterator[Any]) -> None:
        waiting[asyncio.ensure_future(anext(stream, None))] = stream

    try:
        for stream in streams:
            ask(stream)
        while waiting:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task.done()]:
                stream = waiting.pop(task)
                if (item := task.result()) is not None:
                    yield item
                    ask(stream)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
