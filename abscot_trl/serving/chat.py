"""
OpenAI's chat completions by two calls of vLLM's completions endpoint, ids in and out: the trace, then the answer.

The trace is the reply's `reasoning_content` and counts as a reasoning model's thoughts do: in `completion_tokens` and
against `max_tokens`. Trace and answer are decoded greedily unless request or server say otherwise, as in `evaluate`.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from abscot_trl.examples import prompt_ids
from abscot_trl.serving.request import ApiError, ChatRequest, Completion, parse_request
from abscot_trl.traces.server import DIGEST
from abscot_trl.traces.vllm import row_seed, sampling_parameters, trace_parameters
from abscot_trl.vocabulary import AbstractVocabulary

PASSED_ON = [("GET", "/health"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/tokenize")]
# A body of more bytes than the first for each position, and the second for all else, cannot fit the model: a token is
# four characters or so, and JSON may write a character in six bytes or twelve.
TOKEN_BYTES, OTHER_BYTES = 64, 2**16


@dataclass
class Turn:
    """A prompt (with `<beginabstract>`), its trace, whether `<endabstract>` follows, and how many tokens are left."""

    prompt: list[int]
    trace: list[int]
    ended: bool
    left: int

    def usage(self, answer_tokens: int) -> dict:
        thought = len(self.trace) + self.ended
        counts = {"prompt_tokens": len(self.prompt), "completion_tokens": thought + answer_tokens}
        details = {"completion_tokens_details": {"reasoning_tokens": thought}}
        return {**counts, "total_tokens": sum(counts.values()), **details}


@dataclass
class Chat:
    """
    The two calls of a request.

    Args:
        client (`httpx.AsyncClient`): of the upstream, a `vllm serve`.
        model (`str`): the upstream's name of the checkpoint.
        tokenizer, vocabulary: the checkpoint's.
        positions (`int`): longest sequence of the upstream.
        stops (`list[int]`): ids that end an answer.
        trace_temperature (`float`): where a request gives none.
        digest (`str`, *optional*): of the checkpoint's weights, for clients that have it too.

    Once `closing` is set, requests that are not done are refused.
    """

    client: httpx.AsyncClient
    model: str
    tokenizer: PreTrainedTokenizerBase
    vocabulary: AbstractVocabulary
    positions: int
    stops: list[int]
    trace_temperature: float = 0.0
    digest: str | None = None
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self):
        self.reader = ThreadPoolExecutor(1)  # tokenizing takes seconds and must not hold up the others' replies
        self.names = dict(zip(self.vocabulary.ids(self.tokenizer), self.vocabulary.tokens, strict=True))
        self.begin, self.end = self.vocabulary.begin_id(self.tokenizer), self.vocabulary.end_id(self.tokenizer)

    async def body(self, http: Request) -> bytes:
        """
        Raises:
            ApiError: it is longer than any that the model could take.
        """
        body, limit = bytearray(), TOKEN_BYTES * self.positions + OTHER_BYTES
        async for part in http.stream():
            body += part
            if len(body) > limit:
                raise ApiError(
                    f"the body has over {limit} bytes, more than the model's {self.positions} positions can take; "
                    "shorten it",
                    status=413,
                    code="context_length_exceeded",
                )
        return bytes(body)

    async def read(self, body: bytes) -> tuple[ChatRequest, list[int], int]:
        """The request, as `parse_request`, and its ids and room, as `encode`; in a thread of its own."""

        def parse_and_encode() -> tuple[ChatRequest, list[int], int]:
            request = parse_request(body)
            return request, *self.encode(request)

        return await asyncio.get_running_loop().run_in_executor(self.reader, parse_and_encode)

    def encode(self, request: ChatRequest) -> tuple[list[int], int]:
        """Ids of the messages with `<beginabstract>`, and how many tokens may follow."""
        if request.model not in (None, self.model):
            words = f"model: {request.model!r} is not served here; ask for {self.model!r}"
            raise ApiError(words, "model", 404, "model_not_found")
        try:
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            prompt = [*prompt_ids(messages, self.tokenizer), self.begin]
        except jinja2.TemplateError as error:
            raise ApiError(f"messages: the chat template refuses them ({error}); mend them", "messages") from error
        room, needed = self.positions - len(prompt), request.limit or self.vocabulary.m_max + 2
        if room < needed:
            kind = "max_tokens" if request.limit else "a trace, its end and an answer, together"
            raise ApiError(
                f"a prompt of {len(prompt)} tokens and {kind} {needed} exceed the model's {self.positions} positions; "
                f"shorten the messages{' or lower max_tokens' if request.limit else ''}",
                "messages",
                code="context_length_exceeded",
            )
        return prompt, request.limit or room

    async def think(self, request: ChatRequest, prompt: list[int], budget: int) -> Turn:
        """The first call: the trace, capped by what the request allows."""
        limit = min(self.vocabulary.m_max, budget)
        temperature = self.trace_temperature if request.trace_temperature is None else request.trace_temperature
        seed = None if request.seed is None else row_seed(request.seed)
        fields = trace_parameters([*self.names], self.end, limit, min(self.vocabulary.m_min, limit), temperature, seed)
        body = {"model": self.model, "prompt": prompt, **fields, "logprobs": None, "return_token_ids": True}
        ids = (await self.post(body)).choices[0].token_ids
        if ids is None or not {*ids} <= {*self.names, self.end}:
            raise ApiError.failed(f"a trace of {ids!r:.300}")
        trace = [token for token in ids if token != self.end]
        ended = len(trace) < len(ids) or len(trace) == self.vocabulary.m_max < budget
        return Turn(prompt, trace, ended, budget - len(trace) - ended)

    async def post(self, body: dict) -> Completion:
        response = await self.client.post("/v1/completions", json=body)
        completion = _checked(response, response.text)
        if not completion.choices or completion.usage is None:
            raise ApiError.failed(response.text)
        _check_finish(completion.choices[0].finish_reason)
        return completion

    def answer_body(self, turn: Turn, request: ChatRequest, **fields) -> dict:
        """The second call's request, after prompt, trace and `<endabstract>`."""
        seed = None if request.seed is None else row_seed(request.seed, 1)
        names = ("top_p", "presence_penalty", "frequency_penalty", "stop")
        fields |= {"logprobs": None} | {name: getattr(request, name) for name in names}
        parameters = sampling_parameters(turn.left, request.temperature, self.stops, seed, **fields)
        return {"model": self.model, "prompt": [*turn.prompt, *turn.trace, self.end], **parameters}

    def text(self, turn: Turn) -> str:
        return "".join(self.names[token] for token in turn.trace)

    def reply(self, kind: str, **fields) -> dict:
        names = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }
        return names | fields

    async def complete(self, turn: Turn, request: ChatRequest) -> dict:
        """A whole `chat.completion`."""
        text, finish, tokens = "", "length", 0
        if turn.left:
            completion = await self.post(self.answer_body(turn, request))
            text, finish = completion.choices[0].text, completion.choices[0].finish_reason
            tokens = completion.usage.completion_tokens
        message = {"role": "assistant", "content": text, "reasoning_content": self.text(turn)}
        choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}]
        return self.reply("chat.completion", choices=choices, usage=turn.usage(tokens))

    async def stream(self, turn: Turn, request: ChatRequest) -> AsyncIterator[str]:
        """Server-sent events: role, trace, the answer as it comes, finish, usage; an error is an event too."""
        frame = self.reply("chat.completion.chunk")

        def event(delta: dict, finish: str | None = None) -> str:
            return _event(frame | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield event({"role": "assistant", "content": ""})
        yield event({"reasoning_content": self.text(turn)})
        finish, tokens, answer = "length", 0, self.answer_events(turn, request)
        try:
            while (completion := await self.unless_closing(anext(answer, None))) is not None:
                if completion.choices:
                    finish = completion.choices[0].finish_reason
                    if completion.choices[0].text:
                        yield event({"content": completion.choices[0].text})
                else:
                    tokens = completion.usage.completion_tokens
            _check_finish(finish)
        except (ApiError, httpx.HTTPError) as error:
            yield _event((error if isinstance(error, ApiError) else ApiError.unreachable(error)).body())
            return
        yield event({}, finish)
        if request.stream_options.include_usage:
            yield _event(frame | {"choices": [], "usage": turn.usage(tokens)})
        yield "data: [DONE]\n\n"

    async def answer_events(self, turn: Turn, request: ChatRequest) -> AsyncIterator[Completion]:
        """The upstream's events of the second call, the last one its usage; none if no token is left."""
        if not turn.left:
            return
        body = self.answer_body(turn, request, stream=True, stream_options={"include_usage": True})
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                _checked(response, (await response.aread()).decode(errors="replace"))
            async for line in _lines(response):
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield _checked(response, line.removeprefix("data: "))
        raise ApiError.failed("its answer ended too early")

    async def unless_closing(self, work: Awaitable, gone: Awaitable | None = None) -> Any:
        """
        The result of `work`, which is cancelled, and with it the upstream's, once this server closes (or once the
        client has `gone`: then `None`).

        Raises:
            ApiError: the server closes.
        """
        tasks = [asyncio.ensure_future(each) for each in (work, self.closing.wait(), gone) if each is not None]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] in done:
                return tasks[0].result()
            if tasks[1] in done:
                raise ApiError("this server is closing; try again later", status=503)
        finally:
            for task in tasks:
                task.cancel()


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines that end in a newline; httpx's own also end at U+2028 and its like, inside an answer's JSON."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _checked(response: httpx.Response, text: str) -> Completion:
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


def _check_finish(reason: str | None) -> None:
    if reason not in ("stop", "length"):
        raise ApiError.failed(f"it broke off: {reason}")


async def _gone(http: Request) -> None:
    """Until the client leaves; the body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def chat_app(chat: Chat) -> FastAPI:
    """The endpoints: chat completions, and those of vLLM that are passed on as they are."""
    app = FastAPI(openapi_url=None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(httpx.HTTPError)
    async def unreachable(_: Request, error: httpx.HTTPError) -> Response:
        return await refused(_, ApiError.unreachable(error))

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.post("/v1/chat/completions")
    async def completions(http: Request) -> Response:
        request, prompt, budget = await chat.read(await chat.body(http))

        async def whole() -> dict:
            return await chat.complete(await chat.think(request, prompt, budget), request)

        if not request.stream:
            return JSONResponse(await chat.unless_closing(whole(), _gone(http)))
        # before the status is sent: its errors have their own
        turn = await chat.unless_closing(chat.think(request, prompt, budget), _gone(http))
        if turn is None:
            raise ClientDisconnect
        return StreamingResponse(chat.stream(turn, request), media_type="text/event-stream")

    async def pass_on(http: Request) -> Response:
        headers = {name: http.headers[name] for name in ("content-type", "accept") if name in http.headers}
        asked = chat.client.request(http.method, http.url.path, content=await chat.body(http), headers=headers)
        response = await chat.unless_closing(asked, _gone(http))
        if response is None:
            raise ClientDisconnect
        return Response(response.content, response.status_code, media_type=response.headers.get("content-type"))

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        """vLLM's, with the digest."""
        response = await chat.client.get("/v1/models")
        try:
            content = response.json()
            content["data"][0][DIGEST] = chat.digest
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ApiError.failed(f"{response.status_code}: {response.text}") from error
        return JSONResponse(content, response.status_code)

    for method, path in PASSED_ON:
        app.add_api_route(path, pass_on, methods=[method])
    return app
