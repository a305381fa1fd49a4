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
from dataclasses import dataclass

import httpx
import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import PreTrainedTokenizerBase

from abscot_trl.examples import prompt_ids
from abscot_trl.serving.request import ApiError, ChatRequest, parse_request
from abscot_trl.traces.vllm import row_seed, sampling_parameters, trace_parameters
from abscot_trl.vocabulary import AbstractVocabulary

PASSED_ON = [("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models")]
PASSED_ON += [("POST", "/v1/completions"), ("POST", "/tokenize")]


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
    """

    client: httpx.AsyncClient
    model: str
    tokenizer: PreTrainedTokenizerBase
    vocabulary: AbstractVocabulary
    positions: int
    stops: list[int]
    trace_temperature: float = 0.0

    def __post_init__(self):
        self.names = dict(zip(self.vocabulary.ids(self.tokenizer), self.vocabulary.tokens, strict=True))
        self.begin, self.end = self.vocabulary.begin_id(self.tokenizer), self.vocabulary.end_id(self.tokenizer)

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

    async def think(self, request: ChatRequest) -> Turn:
        """The first call: the trace, capped by what the request allows."""
        prompt, budget = self.encode(request)
        limit = min(self.vocabulary.m_max, budget)
        temperature = self.trace_temperature if request.trace_temperature is None else request.trace_temperature
        seed = None if request.seed is None else row_seed(request.seed)
        fields = trace_parameters([*self.names], self.end, limit, min(self.vocabulary.m_min, limit), temperature, seed)
        body = {"model": self.model, "prompt": prompt, **fields, "logprobs": None, "return_token_ids": True}
        ids = (await self.post(body))["choices"][0]["token_ids"]
        trace = [token for token in ids if token != self.end]
        ended = len(trace) < len(ids) or len(trace) == self.vocabulary.m_max < budget
        return Turn(prompt, trace, ended, budget - len(trace) - ended)

    async def post(self, body: dict) -> dict:
        response = await self.client.post("/v1/completions", json=body)
        completion = _checked(response, response.text)
        _check_finish(completion["choices"][0]["finish_reason"])
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

    async def complete(self, request: ChatRequest) -> dict:
        """A whole `chat.completion`."""
        turn = await self.think(request)
        choice, tokens = {"text": "", "finish_reason": "length"}, 0
        if turn.left:
            completion = await self.post(self.answer_body(turn, request))
            choice, tokens = completion["choices"][0], completion["usage"]["completion_tokens"]
        message = {"role": "assistant", "content": choice["text"], "reasoning_content": self.text(turn)}
        choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": choice["finish_reason"]}]
        return self.reply("chat.completion", choices=choices, usage=turn.usage(tokens))

    async def stream(self, turn: Turn, request: ChatRequest) -> AsyncIterator[str]:
        """Server-sent events: role, trace, the answer as it comes, finish, usage; an error is an event too."""
        frame = self.reply("chat.completion.chunk")

        def event(delta: dict, finish: str | None = None) -> str:
            return _event(frame | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield event({"role": "assistant", "content": ""})
        yield event({"reasoning_content": self.text(turn)})
        finish, tokens = "length", 0
        try:
            async for completion in self.answer_events(turn, request):
                if completion["choices"]:
                    choice = completion["choices"][0]
                    finish = choice["finish_reason"]
                    if choice["text"]:
                        yield event({"content": choice["text"]})
                else:
                    tokens = completion["usage"]["completion_tokens"]
            _check_finish(finish)
        except (ApiError, httpx.HTTPError) as error:
            yield _event((error if isinstance(error, ApiError) else ApiError.unreachable(error)).body())
            return
        yield event({}, finish)
        if request.stream_options.include_usage:
            yield _event(frame | {"choices": [], "usage": turn.usage(tokens)})
        yield "data: [DONE]\n\n"

    async def answer_events(self, turn: Turn, request: ChatRequest) -> AsyncIterator[dict]:
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
        raise ApiError("the vLLM server behind this one ended its answer too early; try again", status=502)


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines that end in a newline; httpx's own also end at U+2028 and its like, inside an answer's JSON."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode()


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _checked(response: httpx.Response, text: str) -> dict:
    """The upstream's JSON; a bad request in its words, anything else as its failure."""
    try:
        content = json.loads(text)
        if response.is_success and "error" not in content:
            return content
        words = content["error"]["message"]
    except (ValueError, TypeError, KeyError):
        words = text[:300]
    if response.status_code == 400:
        raise ApiError(words)
    raise ApiError(
        f"the vLLM server behind this one failed ({response.status_code}: {words}); see its log", status=502
    )


def _check_finish(reason: str | None) -> None:
    if reason not in ("stop", "length"):
        raise ApiError(f"the vLLM server behind this one broke off ({reason}); try again", status=502)


async def while_connected(request: Request, work: Awaitable[dict]) -> dict | None:
    """The result of `work`, which is cancelled, and with it the upstream's, once the client has gone."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    watch.cancel()
    if not task.done():
        task.cancel()
        return None
    return task.result()


def chat_app(chat: Chat) -> FastAPI:
    """The endpoints: chat completions, and those of vLLM that are passed on as they are."""
    app = FastAPI(openapi_url=None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(httpx.HTTPError)
    async def unreachable(_: Request, error: httpx.HTTPError) -> Response:
        return await refused(_, ApiError.unreachable(error))

    @app.post("/v1/chat/completions")
    async def completions(http: Request) -> Response:
        request = parse_request(await http.body())
        if not request.stream:
            return JSONResponse(await while_connected(http, chat.complete(request)))
        turn = await chat.think(request)  # before the status is sent: its errors have their own
        return StreamingResponse(chat.stream(turn, request), media_type="text/event-stream")

    async def pass_on(http: Request) -> Response:
        headers = {name: http.headers[name] for name in ("content-type", "accept") if name in http.headers}
        response = await chat.client.request(http.method, http.url.path, content=await http.body(), headers=headers)
        return Response(response.content, response.status_code, media_type=response.headers.get("content-type"))

    for method, path in PASSED_ON:
        app.add_api_route(path, pass_on, methods=[method])
    return app
