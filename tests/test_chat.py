"""`abscot serve` over something that stands for vLLM: requests, failures on either side, how it starts and ends."""

import asyncio
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from chats import NAME, TRACE, USER, Parts, chat_over, completion, piece, requests, running
from openai import APIError, OpenAI
from requests.exceptions import RetryError
from safetensors.torch import load_file, save_file

from abscot_trl.errors import Refused
from abscot_trl.serving import chat as chat_module
from abscot_trl.serving import server as server_module
from abscot_trl.serving.chat import chat_app
from abscot_trl.serving.server import (
    ServeArguments,
    bind,
    engine_flags,
    load_chat,
    root_cause,
    serve,
)
from abscot_trl.traces.server import DIGEST, ServerTraceSampler, check_server, weights_digest
from abscot_trl.traces.vllm import engine_settings
from abscot_trl.vocabulary import AbstractVocabulary


def test_line_separators_in_an_answer(checkpoint):
    """And characters cut in two by the network."""
    text = "a\u2028b\x85\N{SNOWMAN}"
    content = piece(text) + piece("", "stop") + b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
    parts = [bytes([byte]) for byte in content + b"data: [DONE]\n\n"]

    def vllm(request: httpx.Request) -> httpx.Response:
        streamed = json.loads(request.content).get("stream", False)
        return httpx.Response(200, stream=Parts(*parts)) if streamed else completion(TRACE)

    [response] = requests(chat_app(chat_over(checkpoint, vllm)), {"messages": [USER], "stream": True})
    *_, answer, finish, done = response.text.splitlines()[::2]
    assert json.loads(answer[6:])["choices"][0]["delta"] == {"content": text}
    assert json.loads(finish[6:])["choices"][0]["finish_reason"] == "stop" and done == "data: [DONE]"


FAILURES = {
    "cut": (Parts(piece("7"), httpx.ReadError("reset")), "ReadError: reset"),
    "short": (Parts(piece("7")), "its answer ended too early"),
    "error": (Parts(piece("7"), b'data: {"error": {"message": "engine dead"}}\n\n'), "engine dead"),
    "abort": (Parts(piece("7"), piece("", "abort"), b"data: [DONE]\n\n"), "it broke off: abort"),
    "timeout": (Parts(piece("7"), httpx.ReadTimeout("")), "not a word within `timeout`"),
}


@pytest.mark.parametrize("answer, words", FAILURES.values(), ids=FAILURES)
def test_a_failure_in_mid_stream_is_an_event(checkpoint, answer, words):
    def vllm(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=answer) if json.loads(request.content).get("stream") else completion(TRACE)

    [response] = requests(chat_app(chat_over(checkpoint, vllm)), {"messages": [USER], "stream": True})
    *events, last = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    assert [e["choices"][0]["delta"].get("content") for e in events] == ["", None, "7"]
    assert words in last["error"]["message"] and "[DONE]" not in response.text
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=response.headers, content=response.content))
    client = OpenAI(api_key="none", http_client=httpx.Client(transport=transport))
    with pytest.raises(APIError, match=re.escape(words)):
        list(client.chat.completions.create(model=NAME, messages=[USER], stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_fails_is_502_in_words(checkpoint, stream):
    answers = [
        httpx.ConnectError("refused"),
        httpx.Response(500, text="boom"),
        httpx.Response(200, text="no JSON"),
        httpx.Response(404, json={"error": {"message": "no such model"}}),
        completion([40], "abort"),
        httpx.ReadTimeout(""),
        httpx.Response(400, json={"error": {"message": "bad seed", "param": "seed"}}),
    ]

    def vllm(_: httpx.Request) -> httpx.Response:
        answer = answers[served.pop(0)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    served, body = list(range(len(answers))), {"messages": [USER], "stream": stream}
    found = requests(chat_app(chat_over(checkpoint, vllm)), *[body] * len(answers))
    assert [r.status_code for r in found] == [502] * 5 + [504, 400]
    words = ["ConnectError: refused", "500: boom", "200: no JSON", "no such model", "it broke off: abort"]
    words += ["not a word within `timeout`", "bad seed"]
    assert all(w in r.json()["error"]["message"] for w, r in zip(words, found, strict=True))


CHOICE = {"text": "7", "finish_reason": "stop", "token_ids": TRACE}
USAGE = {"completion_tokens": 2}
SHAPES = {
    "list": [],
    "empty": {},
    "no choice": {"choices": [], "usage": USAGE},
    "choice of another form": {"choices": [7], "usage": USAGE},
    "no text": {"choices": [{"finish_reason": "stop", "token_ids": TRACE}], "usage": USAGE},
    "number": {"choices": [CHOICE | {"text": 7}], "usage": USAGE},
    "no finish": {"choices": [{"text": "7", "token_ids": TRACE}], "usage": USAGE},
    "no usage": {"choices": [CHOICE]},
    "words for usage": {"choices": [CHOICE], "usage": {"completion_tokens": "many"}},
}


@pytest.mark.parametrize("shape", [*SHAPES.values(), "[" * 9999], ids=[*SHAPES, "deep"])
def test_an_upstream_that_answers_otherwise_is_502_in_words(checkpoint, shape):
    """As the trace's reply, as the answer's, and as an event of its stream."""
    text = shape if isinstance(shape, str) else json.dumps(shape)

    def vllm(request: httpx.Request) -> httpx.Response:
        fields = json.loads(request.content)
        if not at_once and "allowed_token_ids" in fields:
            return completion(TRACE)
        if fields.get("stream"):
            return httpx.Response(200, stream=Parts(piece("7"), f"data: {text}\n\n".encode()))
        return httpx.Response(200, text=text)

    for at_once, stream in ((True, False), (True, True), (False, False)):  # noqa: B007 - `vllm` reads it
        [response] = requests(chat_app(chat_over(checkpoint, vllm)), {"messages": [USER], "stream": stream})
        assert response.status_code == 502
        assert "the vLLM server behind this one failed" in response.json()["error"]["message"]
    at_once = False
    [response] = requests(chat_app(chat_over(checkpoint, vllm)), {"messages": [USER], "stream": True})
    last = json.loads(response.text.splitlines()[-2][6:])
    assert "the vLLM server behind this one failed" in last["error"]["message"]


@pytest.mark.parametrize("ids", [None, [5, 49], [10**9]])
def test_a_trace_of_other_tokens_is_502(checkpoint, ids):
    [response] = requests(chat_app(chat_over(checkpoint, lambda _: completion_of(ids))), {"messages": [USER]})
    assert response.status_code == 502 and f"a trace of {ids}" in response.json()["error"]["message"]


def completion_of(ids: list[int] | None) -> httpx.Response:
    return httpx.Response(200, json={"choices": [CHOICE | {"token_ids": ids}], "usage": USAGE})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_body_that_no_model_could_take_is_413(checkpoint, path):
    """Unread: neither tokenized nor passed on."""

    async def post() -> httpx.Response:
        body = json.dumps({"messages": [USER | {"content": "3" * 100_000}], "prompt": "3" * 100_000})
        app = chat_app(chat_over(checkpoint, lambda _: pytest.fail("it was passed on")))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=body)

    response = asyncio.run(post())
    assert response.status_code == 413
    assert "the body has over 81920 bytes, more than the model's 256 positions" in response.json()["error"]["message"]


def test_tokenizing_holds_up_nobody(checkpoint, monkeypatch):
    """A health check is answered while a prompt is tokenized, which here waits for that."""
    answered, tokenizing = threading.Event(), threading.Event()

    def slowly(messages, tokenizer) -> list[int]:
        tokenizing.set()
        assert answered.wait(timeout=60), "/health waits for the tokenizer"
        return [3]

    def vllm(request: httpx.Request) -> httpx.Response:
        return completion(TRACE) if request.url.path == "/v1/completions" else httpx.Response(200)

    async def both() -> httpx.Response:
        app = chat_app(chat_over(checkpoint, vllm))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            chat = asyncio.ensure_future(client.post("/v1/chat/completions", json={"messages": [USER]}))
            await asyncio.to_thread(tokenizing.wait, 60)
            assert (await client.get("/health")).status_code == 200
            answered.set()
            return await chat

    monkeypatch.setattr(chat_module, "prompt_ids", slowly)
    assert asyncio.run(both()).status_code == 200


def test_clients_that_send_too_much_or_too_little(checkpoint, caplog):
    """50 MB are refused at once, and a client that leaves within its body is forgotten."""
    with running(chat_over(checkpoint, lambda _: completion(TRACE))) as (_, url):
        begun = time.monotonic()
        body = b'{"messages": [{"role": "user", "content": "' + b"3 + 4 = " * 6_500_000
        assert httpx.post(f"{url}/v1/chat/completions", content=body, timeout=60).status_code == 413
        assert time.monotonic() - begun < 60
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert httpx.post(f"{url}/v1/chat/completions", json={"messages": [USER]}).status_code == 200
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text


def test_requests_under_way_are_told_when_it_stops(checkpoint, monkeypatch, caplog):
    """One that waits for a whole answer, one in the middle of a stream; one that ends in time gets its answer."""

    async def vllm(request: httpx.Request) -> httpx.Response:
        fields = json.loads(request.content)
        if "allowed_token_ids" in fields:
            return completion(TRACE)
        asked.append(fields)
        if "quick" in fields.get("stop", []):
            await asyncio.sleep(0.5)
            return completion([5, 6])
        return httpx.Response(200, stream=Parts(piece("7"), None)) if fields.get("stream") else await asyncio.Future()

    def ask(**fields) -> None:
        body = {"messages": [USER], **fields}
        replies[str(fields)] = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)

    asked, replies = [], {}
    monkeypatch.setattr(server_module, "PATIENCE", 2)
    with running(chat_over(checkpoint, vllm)) as (server, url):
        fields = ({}, {"stream": True}, {"stop": "quick"})
        clients = [threading.Thread(target=ask, kwargs=each) for each in fields]
        for client in clients:
            client.start()
        while len(asked) < 3:
            time.sleep(0.01)
        server.should_exit = True
        for client in clients:
            client.join()
    whole, stream, quick = (replies[str(each)] for each in fields)
    error = {"message": "this server is closing; try again later", "type": "server_error", "param": None, "code": None}
    assert (whole.status_code, whole.json()) == (503, {"error": error})
    assert json.loads(stream.text.splitlines()[-2][6:]) == {"error": error} and '"content": "7"' in stream.text
    assert quick.json()["choices"][0]["message"]["content"] == "xx"
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_request_along(checkpoint, stream):
    """In the middle of the trace, the first call."""

    async def leave() -> None:
        asked, cancelled = asyncio.Event(), asyncio.Event()

        async def vllm(_: httpx.Request) -> httpx.Response:
            asked.set()
            try:
                return await asyncio.Future()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        content = json.dumps({"messages": [USER], "stream": stream}).encode()
        body = [{"type": "http.request", "body": content}]

        async def receive() -> dict:
            if body:
                return body.pop()
            await asked.wait()
            return {"type": "http.disconnect"}

        async def send(_: dict) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
        await chat_app(chat_over(checkpoint, vllm))(scope, receive, send)
        await asyncio.wait_for(cancelled.wait(), timeout=60)

    asyncio.run(leave())


def test_engine_arguments_as_flags():
    engine = {"tensor_parallel_size": 2, "enforce_eager": True, "enable_chunked_prefill": False, "dtype": "float32"}
    assert engine_flags(engine | {"lora_modules": ["a", "b"], "compilation_config": {"level": 0}}) == [
        "--tensor-parallel-size=2",
        "--enforce-eager",
        "--no-enable-chunked-prefill",
        "--dtype=float32",
        "--lora-modules",
        "a",
        "b",
        '--compilation-config={"level": 0}',
    ]
    for name in ("trust_remote_code", "trust-remote-code", "port", "logprobs_mode"):
        with pytest.raises(ValueError, match=f"engine: {name} is .*leave it out"):
            engine_flags({name: True})
    with pytest.raises(ValueError, match="engine: dtype has no value"):
        engine_flags({"dtype": None})


def test_no_prefill_is_cut_on_cpu(monkeypatch):
    """Of a seeded request it would kill vLLM there."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: True)
    engine = {"max-model-len": 256, "enable_prefix_caching": False}
    settings = {"max_model_len": 256, "enable_prefix_caching": False, "enable_chunked_prefill": False}
    assert engine_settings(engine) == settings
    assert engine_settings({"enable_chunked_prefill": False})["enable_chunked_prefill"] is False
    for name, value in {"enable_chunked_prefill": True, "long-prefill-token-threshold": 64}.items():
        with pytest.raises(Refused, match=f"engine: {name.replace('-', '_')} {value} cuts prefills, .*leave it out"):
            engine_settings({name: value})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    settings = {"enable_prefix_caching": True, "enable_chunked_prefill": True}
    assert engine_settings({"enable_chunked_prefill": True}) == settings


def test_arguments():
    assert ServeArguments("x", engine='{"max_model_len": 256}').engine == {"max_model_len": 256}
    for fields, words in {
        ("engine", "{"): "is no JSON object",
        ("engine", "[1]"): "is no mapping",
        ("engine", '{"trust_remote_code": true}'): "trust_remote_code is never set here",
        ("upstream", "localhost:8000"): "write http://host:port",
        ("trace_temperature", -1.0): "must not be negative",
        ("timeout", 0.0): "timeout must be positive",
    }.items():
        with pytest.raises(ValueError, match=words):
            ServeArguments("x", **dict([fields]))
    with pytest.raises(ValueError, match="upstream's own"):
        ServeArguments("x", upstream="http://a:1", engine={"dtype": "float32"})
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match=f"cannot listen on 127.0.0.1:{port} .*choose another"):
            bind("127.0.0.1", port)


LOG = """\
(VllmWorker-0 pid=55) ERROR 11-26 12:15:02 [multiproc_executor.py:948] WorkerProc failed to start.
(VllmWorker-0 pid=55) ERROR 11-26 12:15:02 [multiproc_executor.py:948] Traceback (most recent call last):
(VllmWorker-0 pid=55) ERROR 11-26 12:15:02 [multiproc_executor.py:948]     raise ValueError(
(VllmWorker-0 pid=55) ERROR 11-26 12:15:02 [multiproc_executor.py:948] ValueError: Available memory on node 0 \
(12.8/16.46 GiB) on startup is less than desired CPU memory utilization (0.99, 16.3 GiB).
(EngineCore pid=06) ERROR 11-26 12:15:08 [core.py:1433] EngineCore failed to start.
(EngineCore pid=06) ERROR 11-26 12:15:08 [core.py:1433] Traceback (most recent call last):
(EngineCore pid=06) ERROR 11-26 12:15:08 [core.py:1433]     raise e from None
(EngineCore pid=06) ERROR 11-26 12:15:08 [core.py:1433] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
CAUSES = {
    LOG: "ValueError: Available memory on node 0 (12.8/16.46 GiB) on startup is less than desired CPU memory "
    "utilization (0.99, 16.3 GiB).",
    "usage: main.py [-h]\nmain.py: error: unrecognized arguments: --no-such=1\n": "main.py: error: unrecognized "
    "arguments: --no-such=1",
    "Traceback (most recent call last):\npydantic_core.ValidationError: 1 validation error for Config\n"
    "  Value error, max_model_len (9999) is too long. [type=value_error, input_value=1]\n"
    "    For further information visit https://x\n": "pydantic_core.ValidationError: 1 validation error "
    "for Config Value error, max_model_len (9999) is too long.",
    "KeyError: 'x'\n\nDuring handling of the above exception, another exception occurred:\n\nTraceback (most recent "
    "call last):\ntorch.OutOfMemoryError: CUDA out of memory.\nException: it failed\n": "torch.OutOfMemoryError: "
    "CUDA out of memory.",
    "INFO 11-26 12:15:08 [core.py:1] Error: none\nall is well\n": None,
}


@pytest.mark.parametrize("log, cause", CAUSES.items(), ids=["memory", "flag", "pydantic", "chain", "none"])
def test_the_root_cause_in_vllms_log(log, cause):
    assert root_cause(log.splitlines(keepends=True)) == cause


DIES_AT_ONCE = "print('no such flag')\nraise SystemExit(3)\n"
DIES_OF_MEMORY = f"print({LOG!r})\nraise SystemExit(1)\n"
DIES_LATER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    asked = []
    def do_GET(self):
        self.reply({"data": [{"id": "x", "max_model_len": 256, "root": sys.argv[sys.argv.index("serve") + 1]}]})
        self.asked.append(self.path)
        if self.asked.count("/v1/models") == 3:  # the last question before the server is up
            os._exit(7)
    def do_POST(self):
        self.reply({"choices": [{"text": "<endabstract>", "logprobs": {"token_logprobs": [0.0]}}]})
    def reply(self, content):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

port = next(int(a.removeprefix("--port=")) for a in sys.argv if a.startswith("--port="))
print("engine dead", flush=True)
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def in_vllms_place(script: str, folder: Path, monkeypatch) -> None:
    (folder / "vllm.py").write_text(script)
    fake = folder / "python"
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "vllm.py"}" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


@pytest.mark.parametrize(("size", "runner"), [(1022, "None"), (1023, "0")])
def test_a_codebook_too_large_for_the_newer_runner_gets_the_older_one(tmp_path, monkeypatch, size, runner):
    """Whose limit counts both delimiters: an answer bars them too."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    AbstractVocabulary(size, 1, 8).save(tmp_path)
    in_vllms_place("import os\nprint(os.environ.get('VLLM_USE_V2_MODEL_RUNNER'))\n", tmp_path, monkeypatch)
    child = server_module.VLLMServer(ServeArguments(str(tmp_path)))
    child.process.wait()
    with pytest.raises(Refused, match=f"the end of its log: {runner}$"):
        child.check()


@pytest.mark.parametrize(
    "script, words",
    [
        (DIES_AT_ONCE, "exit code 3; the end of its log: no such flag"),
        (DIES_OF_MEMORY, r"exit code 1: ValueError: .* \(12.8/16.46 GiB\) .*; .* --engine .*utilization\": 0.73}'"),
        (DIES_LATER, "exit code 7; the end of its log: engine dead"),
    ],
    ids=["at once", "of memory", "later"],
)
def test_it_stops_with_words_when_vllm_dies(checkpoint, tmp_path, monkeypatch, script, words):
    in_vllms_place(script, tmp_path, monkeypatch)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    try:
        with pytest.raises(Refused, match=words):
            serve(ServeArguments(str(checkpoint), port=port))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    with socket.socket() as closed, pytest.raises(ConnectionRefusedError):
        closed.connect(("127.0.0.1", port))


# Which checkpoint a server serves


class FakeVLLM(BaseHTTPRequestHandler):
    """Serves what `about` says, under the right token names; never answers a chat."""

    def do_GET(self):
        self.reply({"object": "list", "data": [self.server.about]} if self.server.about else {"detail": "Not Found"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked["max_tokens"] > 1:
            time.sleep(2)
        else:
            self.reply({"choices": [{"text": "<endabstract>", "logprobs": {"token_logprobs": [0.0]}}]})

    def reply(self, content: dict) -> None:
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def fake():
    """A running [`FakeVLLM`], whose `about` is to be set, and whose `url` is."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeVLLM) as server:
        server.daemon_threads, server.url = True, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def trained(checkpoint, tmp_path):
    """The same checkpoint one step on: its files, but for one number of its weights."""
    folder = tmp_path / "trained"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("chat", [False, True], ids=["sampler", "serve"])
def test_a_server_of_other_weights_is_refused(checkpoint, trained, fake, tmp_path, chat):
    def ask() -> None:
        if chat:
            load_chat(ServeArguments(str(checkpoint), upstream=fake.url), fake.url)
        else:
            ServerTraceSampler(fake.url, str(checkpoint))

    about = {"id": "SOME/OTHER-model", "max_model_len": 256}
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy, copy_function=shutil.copyfile)  # as on another machine: later
    for other, words in [
        (
            {},
            "SOME/OTHER-model from None, which is not to be seen .* cannot be known; serve that by `abscot serve`",
        ),
        ({"root": "/elsewhere/model"}, "from /elsewhere/model, which is not to be seen from here"),
        ({"root": str(trained)}, f"whose weights are not those of {checkpoint}: serve the checkpoint"),
        ({"root": "/elsewhere", DIGEST: weights_digest(trained)}, "whose weights are not those of"),
        ({"root": str(checkpoint), DIGEST: weights_digest(trained)}, "whose weights are not those of"),
        ({"root": str(copy)}, None),
        ({"root": "/elsewhere", DIGEST: weights_digest(copy)}, None),
    ]:
        fake.about = about | other
        if words is None:
            ask()
        else:
            with pytest.raises(Refused, match=words):
                ask()


def test_a_base_model_by_a_server(trained, fake, tmp_path):
    """No codebook, so no token to ask for; a hub id is known by its name."""
    base, other = tmp_path / "base", tmp_path / "other"
    for folder in (base, other):
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("abstract_vocabulary.json"))
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    fake.about = {"id": "base", "root": str(base), "max_model_len": 256}
    assert ServerTraceSampler(fake.url, str(base)).positions == 256
    with pytest.raises(Refused, match="whose weights are not those of"):
        ServerTraceSampler(fake.url, str(other))


@pytest.mark.parametrize("about", [None, {"id": "x"}, {"id": 5, "max_model_len": 256}, [3], "x"])
def test_what_is_no_vllm_server_is_refused(checkpoint, fake, about):
    fake.about = about
    with pytest.raises(Refused, match=f"no vLLM server answers at {fake.url} .*; start it, or mend the address"):
        ServerTraceSampler(fake.url, str(checkpoint))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "http://[", ""])
def test_where_nothing_answers(checkpoint, url):
    with pytest.raises(Refused, match="no vLLM server answers at .*; start it, or mend the address"):
        ServerTraceSampler(url, str(checkpoint))


def test_an_upstream_that_falls_silent(checkpoint, fake):
    """504 after `timeout`."""
    fake.about = {"id": "x", "root": str(checkpoint), "max_model_len": 256}
    chat = load_chat(ServeArguments(str(checkpoint), upstream=fake.url, timeout=0.2), fake.url)
    [response] = requests(chat_app(chat), {"messages": [USER]})
    assert response.status_code == 504 and "not a word within `timeout`" in response.json()["error"]["message"]


def test_models_tells_the_digest(checkpoint, fake):
    fake.about = {"id": "x", "root": str(checkpoint), "max_model_len": 256}
    with running(load_chat(ServeArguments(str(checkpoint), upstream=fake.url), fake.url)) as (_, url):
        assert httpx.get(f"{url}/v1/models").json()["data"] == [fake.about | {DIGEST: weights_digest(checkpoint)}]
        fake.about = None
        assert httpx.get(f"{url}/v1/models").status_code == 502


def test_a_server_that_fails_again_and_again_is_refused():
    def post(url, **_):
        raise RetryError("Max retries exceeded")

    client = SimpleNamespace(base_url="http://x", model="m", session=SimpleNamespace(post=post))
    with pytest.raises(Refused, match="http://x does not answer .Max retries exceeded"):
        check_server(client, 49, "<endabstract>")
