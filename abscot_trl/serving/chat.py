"""
OpenAI's chat completions by two calls of vLLM's completions endpoint, ids in and out: the trace, then the answer.

The trace is the reply's `reasoning_content` and counts as a reasoning model's thoughts do: in `completion_tokens` and
against `max_tokens`. Trace and answer are decoded greedily unless request or server say otherwise, as in `evaluate`.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from abscot_trl.examples import prompt_ids
from abscot_trl.serving.request import ApiError, ChatRequest, parse_request
from abscot_trl.serving.upstream import (
    NO_TOKENS,
    Choice,
    Completion,
    check_finish,
    checked,
    lines,
    merged,
    together,
)
from abscot_trl.traces.server import DIGEST
from abscot_trl.traces.vllm import sampling_parameters, trace_parameters, without
from abscot_trl.vocabulary import AbstractVocabulary

PASSED_ON = [("GET", "/health"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/tokenize")]
# A body of more bytes than the first for each position, and the second for all else, cannot fit the model: a token is
# four characters or so, and JSON may write a character in six bytes or twelve.
TOKEN_BYTES, OTHER_BYTES = 64, 2**16
# What the second call takes from a request as it is.
OF_ANSWERS = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
OF_ANSWERS += ("stop", "ignore_eos")


@dataclass
class Turn:
    """
    A choice: its number, the prompt (with `<beginabstract>`), its trace, whether `<endabstract>` follows, how many
    tokens are left to its answer, and, later, how many that took.
    """

    index: int
    prompt: list[int]
    trace: list[int]
    ended: bool
    left: int
    answered: int = 0


def usage(turns: Sequence[Turn]) -> dict:
    """Of all choices; the prompt, which they share, counts once."""
    thought = sum(len(turn.trace) + turn.ended for turn in turns)
    written = thought + sum(turn.answered for turn in turns)
    counts = {"prompt_tokens": len(turns[0].prompt), "completion_tokens": written}
    details = {"completion_tokens_details": {"reasoning_tokens": thought}}
    return {**counts, "total_tokens": sum(counts.values()), **details}


@dataclass
class Chat:
    """
    The two calls of each choice of a request.

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
        self.barred = without(self.vocabulary.all_ids(self.tokenizer))  # from answers, as in evaluation

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
            name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
            kind = name if request.limit else "a trace, its end and an answer, together"
            raise ApiError(
                f"a prompt of {len(prompt)} tokens and {kind} {needed} exceed the model's {self.positions} positions; "
                f"shorten the messages{f' or lower {name}' if request.limit else ''}",
                "messages",
                code="context_length_exceeded",
            )
        return prompt, request.limit or room

    async def think(self, request: ChatRequest, prompt: list[int], budget: int, index: int) -> Turn:
        """A choice's first call: the trace, capped by what the request allows."""
        limit = min(self.vocabulary.m_max, budget)
        temperature = self.trace_temperature if request.trace_temperature is None else request.trace_temperature
        seed, m_min = request.seed_of(index, 0), min(self.vocabulary.m_min, limit)
        fields = trace_parameters([*self.names], self.end, limit, m_min, temperature, seed)
        body = {"model": self.model, "prompt": prompt, **fields, "logprobs": None, "return_token_ids": True}
        ids = (await self.post(body)).choices[0].token_ids
        if ids is None or not {*ids} <= {*self.names, self.end}:
            raise ApiError.failed(f"a trace of {ids!r:.300}")
        trace = [token for token in ids if token != self.end]
        ended = len(trace) < len(ids) or len(trace) == self.vocabulary.m_max < budget
        return Turn(index, prompt, trace, ended, budget - len(trace) - ended)

    async def think_all(self, request: ChatRequest, prompt: list[int], budget: int) -> list[Turn]:
        """The first call of each of the `n` choices, at once."""
        return await together([self.think(request, prompt, budget, index) for index in range(request.n)])

    async def post(self, body: dict) -> Completion:
        response = await self.client.post("/v1/completions", json=body)
        completion = checked(response, response.text)
        if not completion.choices or completion.usage is None:
            raise ApiError.failed(response.text)
        check_finish(completion.choices[0].finish_reason)
        return completion

    def answer_body(self, turn: Turn, request: ChatRequest, **fields) -> dict:
        """The second call's request, after prompt, trace and `<endabstract>`."""
        fields |= {name: getattr(request, name) for name in OF_ANSWERS} | self.barred
        fields |= {"logprobs": request.top_logprobs if request.logprobs else None, "return_tokens_as_token_ids": True}
        seed = request.seed_of(turn.index, 1)
        parameters = sampling_parameters(turn.left, request.temperature, self.ends(request), seed, **fields)
        return {"model": self.model, "prompt": [*turn.prompt, *turn.trace, self.end], **parameters}

    def ends(self, request: ChatRequest) -> list[int]:
        """Ids that end the answer."""
        return [] if request.ignore_eos else self.stops

    def text(self, turn: Turn) -> str:
        return "".join(self.names[token] for token in turn.trace)

    def logprobs(self, request: ChatRequest, choice: Choice) -> dict | None:
        """Of an answer's tokens, if they were asked for, but the one that ends it, which is not of its text."""
        if not request.logprobs:
            return None
        return (choice.logprobs or NO_TOKENS).as_chat(self.tokenizer, self.ends(request), request.top_logprobs)

    def reply(self, kind: str, **fields) -> dict:
        names = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }
        return names | fields

    async def complete(self, request: ChatRequest, prompt: list[int], budget: int) -> dict:
        """A whole `chat.completion`."""
        turns = await self.think_all(request, prompt, budget)
        choices = await together([self.answer(turn, request) for turn in turns])
        return self.reply("chat.completion", choices=choices, usage=usage(turns))

    async def answer(self, turn: Turn, request: ChatRequest) -> dict:
        """A whole choice of the reply, by the second call; without one if no token is left."""
        found = Choice(text="", finish_reason="length")
        if turn.left:
            completion = await self.post(self.answer_body(turn, request))
            found, turn.answered = completion.choices[0], completion.usage.completion_tokens
        message = {"role": "assistant", "content": found.text, "reasoning_content": self.text(turn)}
        logprobs = self.logprobs(request, found)
        return {"index": turn.index, "message": message, "logprobs": logprobs, "finish_reason": found.finish_reason}

    async def stream(self, turns: list[Turn], request: ChatRequest) -> AsyncIterator[str]:
        """Server-sent events: those of the choices as they come, the usage; an error is an event too."""
        frame, choices = self.reply("chat.completion.chunk"), merged([self.deltas(turn, request) for turn in turns])
        try:
            while (choice := await self.unless_closing(anext(choices, None))) is not None:
                yield _event(frame | {"choices": [choice]})
        except (ApiError, httpx.HTTPError) as error:
            yield _event((error if isinstance(error, ApiError) else ApiError.unreachable(error)).body())
            return
        if request.stream_options.include_usage:
            yield _event(frame | {"choices": [], "usage": usage(turns)})
        yield "data: [DONE]\n\n"

    async def deltas(self, turn: Turn, request: ChatRequest) -> AsyncIterator[dict]:
        """A choice's chunks: role, trace, the answer as it comes, finish."""

        def chunk(delta: dict, finish: str | None = None, logprobs: dict | None = None) -> dict:
            return {"index": turn.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

        yield chunk({"role": "assistant", "content": ""})
        yield chunk({"reasoning_content": self.text(turn)})
        finish = "length"
        async for completion in self.answer_events(turn, request):
            if not completion.choices:
                turn.answered = completion.usage.completion_tokens
                continue
            [found] = completion.choices[:1]
            finish, logprobs = found.finish_reason, self.logprobs(request, found)
            if found.text or (logprobs and logprobs["content"]):
                yield chunk({"content": found.text}, logprobs=logprobs)
        check_finish(finish)
        yield chunk({}, finish)

    async def answer_events(self, turn: Turn, request: ChatRequest) -> AsyncIterator[Completion]:
        """The upstream's events of the second call, the last one its usage; none if no token is left."""
        if not turn.left:
            return
        body = self.answer_body(turn, request, stream=True, stream_options={"include_usage": True})
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            if not response.is_success:
                checked(response, (await response.aread()).decode(errors="replace"))
            async for line in lines(response):
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield checked(response, line.removeprefix("data: "))
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


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


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

        if not request.stream:
            return JSONResponse(await chat.unless_closing(chat.complete(request, prompt, budget), _gone(http)))
        # before the status is sent: its errors have their own
        turns = await chat.unless_closing(chat.think_all(request, prompt, budget), _gone(http))
        if turns is None:
            raise ClientDisconnect
        return StreamingResponse(chat.stream(turns, request), media_type="text/event-stream")

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
