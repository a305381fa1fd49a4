"""`abscot serve` as its clients meet it: one real server on loopback, against transformers on the same ids."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest
import sampling
import torch
import yaml
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.data.toy import chain_arithmetic
from abscot_trl.examples import prompt_ids
from abscot_trl.serving.chat import chat_app
from abscot_trl.serving.server import ServeArguments, bind, load_chat
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.traces.server import ServerTraceSampler, weights_digest
from abscot_trl.vocabulary import AbstractVocabulary

pytestmark = pytest.mark.slow
# A batch is full after 25 of the prompts below: a prefill would be cut.
ENGINE = sampling.ENGINE | {"max_num_batched_tokens": 256}
NAME = "tiny"
USER = {"role": "user", "content": "7+4-2="}
CHATS = [
    *([e.prompt for steps in (2, 4, 8) for e in chain_arithmetic(2, steps, 5, seed=0)]),
    [{"role": "system", "content": "1+1="}, USER],
    [USER, {"role": "assistant", "content": "9", "reasoning_content": "<TOKEN_A>"}, {"role": "user", "content": "3="}],
    [{"role": "user", "content": [{"type": "text", "text": "3+"}, {"type": "text", "text": "+4="}]}],
]


@dataclass
class Server:
    url: str
    process: subprocess.Popen
    log: str

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """`abscot serve --config`, from boot to health; booting takes 30 s."""
    sampling.need_vllm()
    folder = tmp_path_factory.mktemp("serve")
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    recipe = {"model": str(checkpoint), "port": port, "engine": ENGINE, "served_model_name": NAME}
    (folder / "serve.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "abscot_trl.cli", "serve", "--config", folder / "serve.yaml"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stderr=log, env=os.environ | sampling.ENVIRONMENT)
    server = Server(f"http://127.0.0.1:{port}", process, folder / "log")
    try:
        wait_until_healthy(server)
        yield server
    finally:
        process.terminate()
        process.wait()


def wait_until_healthy(server: Server) -> None:
    while True:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        try:
            assert httpx.get(f"{server.url}/health").status_code == 200
            return
        except httpx.ConnectError:
            time.sleep(0.1)


@pytest.fixture(scope="module")
def hf(checkpoint):
    """(tokenizer, vocabulary, sampler) of transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    vocabulary = AbstractVocabulary.load(checkpoint)
    return tokenizer, vocabulary, HFTraceSampler(model, tokenizer, vocabulary)


@dataclass
class Expected:
    reasoning: str
    content: str
    finish: str
    usage: tuple[int, int, int, int]  # prompt, completion, total, reasoning


def expected(hf, messages: list[dict], max_tokens: int) -> Expected:
    """The greedy reply by transformers, counted by ids."""
    tokenizer, vocabulary, sampler = hf
    texts = [m["content"] if isinstance(m["content"], str) else "3++4=" for m in messages]
    prefix = prompt_ids([{"role": m["role"], "content": t} for m, t in zip(messages, texts, strict=True)], tokenizer)
    [trace] = sampler.sample([prefix], vocabulary.m_max, vocabulary.m_min, temperature=0.0)
    thought = [*trace.token_ids, sampler.end][:max_tokens]
    content, finish, answered, left = "", "length", 0, max_tokens - len(thought)
    if left:
        [answer] = sampler.answer([[*prefix, sampler.begin, *thought]], left)
        content = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        finish, answered = ("length" if answer.truncated else "stop"), len(answer.token_ids) + (not answer.truncated)
    reasoning = "".join(tokenizer.convert_ids_to_tokens([t for t in thought if t != sampler.end]))
    before, after = len(prefix) + 1, len(thought) + answered
    return Expected(reasoning, content, finish, (before, after, before + after, len(thought)))


def counts(usage) -> tuple[int, int, int, int]:
    details = usage.completion_tokens_details
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, details.reasoning_tokens


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_a_reply_and_its_stream_are_those_of_transformers(server, hf, messages):
    wanted = expected(hf, messages, 24)
    reply = server.client.chat.completions.create(model=NAME, messages=messages, max_tokens=24)
    [choice] = reply.choices
    assert (choice.message.reasoning_content, choice.message.content) == (wanted.reasoning, wanted.content)
    assert (choice.finish_reason, counts(reply.usage)) == (wanted.finish, wanted.usage)
    assert reply.object == "chat.completion" and reply.model == NAME and choice.message.role == "assistant"

    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = server.client.chat.completions.create(model=NAME, messages=messages, max_tokens=24, **options)
    assert counts(last.usage) == wanted.usage and last.choices == [] and len({e.id for e in [*events, last]}) == 1
    deltas = [event.choices[0].delta for event in events]
    assert deltas[0].role == "assistant" and deltas[1].reasoning_content == wanted.reasoning
    assert "".join(delta.content or "" for delta in deltas) == wanted.content
    assert [e.choices[0].finish_reason for e in events] == [None] * (len(events) - 1) + [wanted.finish]
    assert sum(bool(delta.content) for delta in deltas) > 5 or len(wanted.content) < 20  # as it comes, not at the end


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_max_tokens_counts_trace_end_and_answer(server, hf, max_tokens):
    """m_max is 6: up to 7 tokens are trace and end."""
    wanted = expected(hf, [USER], max_tokens)
    reply = server.client.chat.completions.create(model=NAME, messages=[USER], max_completion_tokens=max_tokens)
    [choice] = reply.choices
    assert (choice.message.reasoning_content, choice.message.content) == (wanted.reasoning, wanted.content)
    assert (choice.finish_reason, counts(reply.usage)) == (wanted.finish, wanted.usage)
    assert wanted.finish == "length" and wanted.usage[1] == max_tokens
    *_, last = server.client.chat.completions.create(model=NAME, messages=[USER], max_tokens=max_tokens, stream=True)
    assert last.choices[0].finish_reason == "length"


def test_without_max_tokens_the_positions_are_the_limit(server, hf):
    wanted = expected(hf, [USER], 256 - len(prompt_ids([USER], hf[0])) - 1)
    reply = server.client.chat.completions.create(model=NAME, messages=[USER])
    assert reply.choices[0].message.content == wanted.content and counts(reply.usage) == wanted.usage


def test_stop_ends_the_answer(server, hf):
    content = expected(hf, [USER], 24).content
    stop = content[5]
    reply = server.client.chat.completions.create(model=NAME, messages=[USER], max_tokens=24, stop=stop)
    assert reply.choices[0].message.content == content[: content.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_64_requests_at_once(server, hf):
    """Temperature 1: legal traces, and each the same again for its seed."""
    tokenizer, vocabulary, _ = hf

    def ask(seed: int) -> tuple[str, str]:
        fields = {"temperature": 1.0, "seed": seed, "extra_body": {"trace_temperature": 1.0}}
        reply = server.client.chat.completions.create(model=NAME, messages=[USER], max_tokens=20, **fields)
        return reply.choices[0].message.reasoning_content, reply.choices[0].message.content

    with ThreadPoolExecutor(64) as pool:
        first, second = list(pool.map(ask, range(64))), list(pool.map(ask, range(0, 64, 4)))
    assert first[::4] == second and len(set(first)) > 50
    codebook = set(vocabulary.ids(tokenizer))
    for reasoning, _ in first:
        ids = tokenizer(reasoning, add_special_tokens=False)["input_ids"]
        assert set(ids) <= codebook and vocabulary.m_min <= len(ids) <= vocabulary.m_max
    assert len({reasoning for reasoning, _ in first}) > 20


BAD = {
    "json": (b"{", "the body is not valid JSON"),
    "utf8": (b'{"messages": "\xff"}', "the body is not valid JSON"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not valid JSON"),
    "deep": (b"[" * 20_000, "the body is not valid JSON"),
    "list": ([1], "the body is a JSON list; send a JSON object"),
    "no messages": ({"messages": None}, "messages is missing; give it"),
    "empty": ({"messages": []}, "messages: []: List should have at least 1 item"),
    "text": ({"messages": "hi"}, "messages: 'hi': Input should be a valid list"),
    "message": ({"messages": ["hi"]}, "messages.0: 'hi': Input should be a valid dictionary"),
    "role": ({"messages": [{"role": "tool", "content": "1"}]}, "messages.0.role: 'tool': Input should be 'system'"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content is missing; give it"),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: 3: Input should be a valid str"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "only parts of type 'text' are supported; send text",
    ),
    "name": ({"messages": [USER | {"name": "x"}]}, "messages.0.name: 'x' is not supported: the model sees no names"),
    "unknown": ({"guided_regex": "x"}, "guided_regex: 'x' is not supported: leave it out"),
    "tools": ({"tools": [{"type": "function"}]}, "tools: [{'type': 'function'}] is not supported: no tool is called"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format: {'type': 'json_object'} is not supp"),
    "logprobs": ({"logprobs": 3}, "logprobs: 3: Input should be a valid boolean"),
    "top logprobs": ({"top_logprobs": 3}, "top_logprobs: 3 needs logprobs; set it to true"),
    "bias": ({"logit_bias": {"5": 1}}, "logit_bias: {'5': 1} is not supported: leave it out"),
    "n": ({"n": 129}, "n: 129: at most 128 choices a request; send several"),
    "top_k": ({"top_k": -2}, "top_k: -2: Input should be greater than or equal to -1"),
    "temperature": ({"temperature": -0.5}, "temperature: -0.5: Input should be greater than or equal to 0"),
    "trace temperature": ({"trace_temperature": -1}, "trace_temperature: -1: Input should be greater than or equal"),
    "nan": ({"temperature": float("nan")}, "temperature: nan: Input should be a finite number"),
    "type": ({"temperature": "hot"}, "temperature: 'hot': Input should be a valid number"),
    "boolean": ({"temperature": True}, "temperature: True: Input should be a valid number"),
    "top_p": ({"top_p": 0}, "top_p: 0: Input should be greater than 0"),
    "penalty": ({"presence_penalty": 3}, "presence_penalty: 3: Input should be less than or equal to 2"),
    "stop": ({"stop": [""]}, "stop.0: '': String should have at least 1 character"),
    "seed": ({"seed": 1.5}, "seed: 1.5: Input should be a valid integer"),
    "stream": ({"stream": "yes"}, "stream: 'yes': Input should be a valid boolean"),
    "options": ({"stream_options": {"x": 1}}, "stream_options.x: 1 is not supported: leave it out"),
    "zero": ({"max_tokens": 0}, "max_tokens: 0: Input should be greater than or equal to 1"),
    "too many": ({"max_tokens": 300}, "a prompt of 7 tokens and max_tokens 300 exceed the model's 256 positions"),
    "long": (
        {"messages": [{"role": "user", "content": "3" * 300}]},
        "a prompt of 303 tokens and a trace, its end and an answer, together 8 exceed the model's 256 positions; "
        "shorten the messages",
    ),
}


@pytest.mark.parametrize("body, words", BAD.values(), ids=BAD)
def test_bad_requests_get_400_with_words(server, body, words):
    if isinstance(body, dict):
        body = {"model": NAME, "messages": [USER]} | body
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content)
    error = response.json()["error"]
    assert response.status_code == 400 and words in error["message"], error
    assert error["type"] == "invalid_request_error" and {"param", "code"} < error.keys()


def test_another_model_is_404_and_neutral_fields_are_fine(server):
    def post(**fields) -> httpx.Response:
        body = {"messages": [USER], "max_tokens": 9} | fields
        return httpx.post(f"{server.url}/v1/chat/completions", json=body)

    response = post(model="gpt")
    assert response.status_code == 404 and "'gpt' is not served here; ask for 'tiny'" in response.text
    neutral = {"n": 1, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}
    neutral |= {"logit_bias": {}, "user": "me", "metadata": {"a": "b"}, "stop": None, "max_completion_tokens": None}
    plain, fuller = post(), post(**neutral)
    assert plain.status_code == 200 and fuller.json()["choices"] == plain.json()["choices"]
    assert fuller.json()["usage"] == plain.json()["usage"]


SAMPLED = {"temperature": 1.0, "seed": 5, "extra_body": {"trace_temperature": 1.0}}


@pytest.mark.parametrize("sampled", [SAMPLED, {}], ids=["sampled", "greedy"])
def test_choices_and_their_streams(server, hf, sampled):
    """Legal traces, each its own; choice 0 is that of one request, greedy ones are those of transformers."""
    tokenizer, vocabulary, _ = hf

    def create(**fields):
        return server.client.chat.completions.create(model=NAME, messages=[USER], max_tokens=20, **sampled, **fields)

    one, several, again = create(), create(n=16), create(n=16)
    assert several.choices[0] == one.choices[0] and several.choices == again.choices
    replies = [(choice.message.reasoning_content, choice.message.content) for choice in several.choices]
    if sampled:
        assert len({*replies}) > 12 and len({reasoning for reasoning, _ in replies}) > 6
    else:
        wanted = expected(hf, [USER], 20)
        assert {*replies} == {(wanted.reasoning, wanted.content)}
        assert counts(several.usage)[1] == 16 * wanted.usage[1] and counts(several.usage)[0] == wanted.usage[0]
    for reasoning, _ in replies:
        ids = tokenizer(reasoning, add_special_tokens=False)["input_ids"]
        assert {*ids} <= {*vocabulary.ids(tokenizer)} and vocabulary.m_min <= len(ids) <= vocabulary.m_max
    *events, last = create(n=16, stream=True, stream_options={"include_usage": True})
    assert last.usage == several.usage
    for choice in several.choices:
        own = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert own[1].delta.reasoning_content == choice.message.reasoning_content
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert own[-1].finish_reason == choice.finish_reason


def test_log_probabilities_are_those_of_transformers(server, hf):
    """Greedy: at temperature 1. Drawn at 2: of that. A token for each of the answer's, streamed as whole."""
    tokenizer, vocabulary, sampler = hf
    prefix = prompt_ids([USER], tokenizer)
    for temperature in (0.0, 2.0):
        fields = {"messages": [USER], "max_tokens": 24, "temperature": temperature, "seed": 1, "logprobs": True}
        reply = server.client.chat.completions.create(model=NAME, top_logprobs=5, **fields)
        [choice] = reply.choices
        found = choice.logprobs.content
        special = {*tokenizer.all_special_tokens, *vocabulary.tokens, vocabulary.begin, vocabulary.end}
        assert "".join(step.token for step in found if step.token not in special) == choice.message.content
        thought = tokenizer(choice.message.reasoning_content, add_special_tokens=False)["input_ids"]
        answer = tokenizer.convert_tokens_to_ids([step.token for step in found])
        assert len(found) + len(thought) + 1 + (choice.finish_reason == "stop") == reply.usage.completion_tokens
        before = [*prefix, sampler.begin, *thought, sampler.end]
        with torch.no_grad():
            logits = sampler.model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].double()
        logits[:, sampler.reserved] = -torch.inf  # an answer holds none
        logps = torch.log_softmax(logits / (temperature or 1.0), -1)
        for step, token, logp in zip(found, answer, logps, strict=True):
            assert abs(step.logprob - logp[token].item()) < 1e-4 and bytes(step.bytes).decode() == step.token
            best = torch.topk(logp, 5)
            assert [top.token for top in step.top_logprobs] == tokenizer.convert_ids_to_tokens(best.indices.tolist())
            assert all(abs(t.logprob - v) < 1e-4 for t, v in zip(step.top_logprobs, best.values.tolist(), strict=True))
        events = server.client.chat.completions.create(model=NAME, top_logprobs=5, stream=True, **fields)
        streamed = [step for e in events if e.choices[0].logprobs for step in e.choices[0].logprobs.content]
        assert streamed == found


def test_vllms_sampling_is_of_the_answer(server, hf):
    """top-k 1 is greedy; a repetition penalty changes the answer and leaves the trace; none ends without its end."""
    wanted = expected(hf, [USER], 24)

    def create(**extra) -> tuple[str, str]:
        fields = {"model": NAME, "messages": [USER], "max_tokens": 24, "temperature": 1.0, "seed": 3}
        message = server.client.chat.completions.create(**fields, extra_body=extra).choices[0].message
        return message.reasoning_content, message.content

    assert create(top_k=1) == create(min_p=1.0) == (wanted.reasoning, wanted.content)
    reasoning, content = create(top_k=1, repetition_penalty=5.0)
    assert reasoning == wanted.reasoning and content != wanted.content
    fields = {"max_tokens": 200, "n": 8, "temperature": 1.0, "seed": 0}
    for ignored in (False, True):
        reply = server.client.chat.completions.create(
            model=NAME, messages=[USER], **fields, extra_body={"ignore_eos": ignored}
        )
        finishes = {choice.finish_reason for choice in reply.choices}
        assert finishes == {"length"} if ignored else "stop" in finishes
        assert ignored == (reply.usage.completion_tokens == 8 * 200)


def test_endpoints_that_are_passed_on(server, checkpoint):
    served = server.client.models.list().data[0]
    assert served.id == NAME and served.max_model_len == 256
    assert served.weights_digest == weights_digest(checkpoint)
    assert httpx.get(f"{server.url}/metrics").text.startswith("# HELP")
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "3+4"}).json()
    assert tokens["tokens"] == [8, 24]
    wrong = httpx.post(f"{server.url}/v1/completions", json={"prompt": [3], "temperature": -1})
    assert wrong.status_code == 400 and "temperature" in wrong.json()["error"]["message"]


def test_the_trace_sampler_works_against_it(server, checkpoint, hf):
    """Seeded, and with log-probabilities of the renormalised policy."""
    tokenizer, vocabulary, sampler = hf
    there = ServerTraceSampler(server.url, str(checkpoint))
    prefixes = [prompt_ids(messages, tokenizer) for messages in CHATS[:7]]
    traces, again = (there.sample(prefixes, m_max=5, m_min=2, seed=3) for _ in range(2))
    assert [t.token_ids for t in traces] == [t.token_ids for t in again]
    allowed = torch.tensor([*vocabulary.ids(tokenizer), sampler.end])
    for prefix, trace in zip(prefixes, traces, strict=True):
        with torch.no_grad():
            logits = sampler.model(torch.tensor([[*prefix, sampler.begin, *trace.token_ids]])).logits[0, len(prefix) :]
        for i, (token, logp) in enumerate(zip(trace.token_ids, trace.logps, strict=True)):
            here = allowed[:-1] if i < 2 else allowed
            wanted = torch.log_softmax(logits[i, here].double(), 0)[here.tolist().index(token)].item()
            assert abs(wanted - logp) < 1e-4


def test_a_chat_over_an_upstream(server, checkpoint, hf, tmp_path):
    """`--upstream`: the protocol in this process, vLLM elsewhere; another checkpoint's is refused."""
    wanted = expected(hf, [USER], 20)
    app = chat_app(load_chat(ServeArguments(str(checkpoint), upstream=server.url), server.url))

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 20})

    message = asyncio.run(post()).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (wanted.reasoning, wanted.content)
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = AutoTokenizer.from_pretrained(checkpoint)
    other.add_tokens(["another"])
    text = (
        (tmp_path / "tokenizer.json").read_text().replace("<endabstract>", "<x>").replace("<TOKEN_C>", "<endabstract>")
    )
    (tmp_path / "tokenizer.json").write_text(text.replace("<x>", "<TOKEN_C>"))
    with pytest.raises(ValueError, match="serve the checkpoint that `model` names"):
        load_chat(ServeArguments(str(tmp_path), upstream=server.url), server.url)


def test_the_model_cards_client_runs(server, checkpoint, capsys):
    snippet = re.findall("```python\n(.*?)```", (checkpoint / "README.md").read_text(), re.DOTALL)[1]
    exec(snippet.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.startswith("<TOKEN_")


def test_sigterm_stops_it_and_leaves_nothing(server):
    """In the middle of an answer."""
    stream = iter(server.client.chat.completions.create(model=NAME, messages=[USER], stream=True))
    next(stream)
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(children) >= 2  # the server and its engine
    server.process.send_signal(signal.SIGTERM)
    assert [event.choices[0].finish_reason for event in stream][-1] == "length"
    assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in server.log.read_text()
    assert psutil.wait_procs(children, timeout=60)[1] == []
