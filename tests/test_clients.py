"""What real chat clients send to `abscot serve`, over something that stands for vLLM: what is taken, what refused."""

import asyncio
import json
import re
from pathlib import Path

import httpx
import pytest
from chats import NAME, TRACE, USER, Parts, chat_over, completion, piece, requests, running
from openai import BadRequestError, OpenAI

from abscot_trl.serving.chat import chat_app
from abscot_trl.serving.request import LABELS, NEUTRAL, ChatRequest, parse_request

README = Path(__file__).parents[1] / "abscot_trl/serving/README.md"
END = [49]
SAMPLED = {"temperature": 1.0, "trace_temperature": 1.0}


class Engine:
    """In vLLM's place: what it writes follows from the seed alone, as drawn; its requests are kept."""

    def __init__(self):
        self.bodies = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        seed = body["seed"] if body["temperature"] and body["seed"] is not None else 0
        if "allowed_token_ids" in body:
            return completion([*[40 + seed % 8] * (1 + seed % 5), *END][: body["max_tokens"]])
        text = str(seed)
        if not body.get("stream"):
            choice = {"text": text, "finish_reason": "stop"}
            return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": len(text)}})
        usage = {"choices": [], "usage": {"completion_tokens": len(text)}}
        last = f"data: {json.dumps(usage)}\n\n".encode()
        return httpx.Response(200, stream=Parts(*map(piece, text), piece("", "stop"), last, b"data: [DONE]\n\n"))

    @property
    def answers(self) -> list[dict]:
        return [body for body in self.bodies if "allowed_token_ids" not in body]

    @property
    def traces(self) -> list[dict]:
        return [body for body in self.bodies if "allowed_token_ids" in body]


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def client(checkpoint, engine):
    """The real client of a running server."""
    with running(chat_over(checkpoint, engine)) as (_, url):
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(checkpoint, engine, **fields) -> httpx.Response:
    [response] = requests(chat_app(chat_over(checkpoint, engine)), {"messages": [USER], "max_tokens": 30, **fields})
    return response


# Several choices


def test_choices_each_of_their_own_draws(client, engine):
    """Choice 0 is the reply to n = 1; the others' seeds follow from the request's; usage is of all."""

    def create(**fields):
        fields |= {"temperature": 1.0, "seed": 3, "extra_body": {"trace_temperature": 1.0}}
        return client.chat.completions.create(model=NAME, messages=[USER], max_tokens=30, **fields)

    one, four, again, more = create(), create(n=4), create(n=4), create(n=6)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert four.choices[:1] == one.choices and four.choices == again.choices == more.choices[:4]
    assert len({choice.message.content for choice in more.choices}) == 6
    assert len({choice.message.reasoning_content for choice in more.choices}) > 2
    assert len({body["seed"] for body in engine.bodies}) == 12  # a trace's and an answer's each
    traces = [choice.message.reasoning_content.count("<TOKEN_") + 1 for choice in four.choices]
    answers = [len(choice.message.content) for choice in four.choices]
    assert four.usage.completion_tokens == sum(traces) + sum(answers)
    assert four.usage.completion_tokens_details.reasoning_tokens == sum(traces)
    assert four.usage.prompt_tokens == one.usage.prompt_tokens
    assert four.usage.total_tokens == four.usage.prompt_tokens + four.usage.completion_tokens


@pytest.mark.parametrize("n", [1, 5])
def test_streamed_choices_are_those_of_the_reply(client, n):
    fields = {"temperature": 1.0, "seed": 3, "extra_body": {"trace_temperature": 1.0}, "max_tokens": 30, "n": n}
    whole = client.chat.completions.create(model=NAME, messages=[USER], **fields)
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = client.chat.completions.create(model=NAME, messages=[USER], **fields)
    assert last.choices == [] and last.usage == whole.usage
    for choice in whole.choices:
        own = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant" and own[1].delta.reasoning_content == choice.message.reasoning_content
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + ["stop"]


def test_without_a_seed_none_is_sent_and_greedy_choices_are_equal(checkpoint, engine):
    choices = ask(checkpoint, engine, n=3).json()["choices"]
    assert {body["seed"] for body in engine.bodies} == {None}
    assert choices == [choices[0] | {"index": index} for index in range(3)]


def test_a_choice_that_waits_holds_up_no_other(checkpoint):
    """The answer to choice 0 comes once the client has all of choice 1."""

    async def listen() -> list[int]:
        other, answers = asyncio.Event(), []

        class Late(httpx.AsyncByteStream):
            async def __aiter__(self):
                await other.wait()
                yield piece("0", "stop") + b"data: [DONE]\n\n"

        def vllm(request: httpx.Request) -> httpx.Response:
            if "allowed_token_ids" in json.loads(request.content):
                return completion(TRACE)
            answers.append(request)
            late = Late() if len(answers) == 1 else Parts(piece("1", "stop"), b"data: [DONE]\n\n")
            return httpx.Response(200, stream=late)

        chat = chat_over(checkpoint, vllm)
        request, prompt, budget = await chat.read(json.dumps({"messages": [USER], "n": 2, "stream": True}).encode())
        finished = []
        async for line in chat.stream(await chat.think_all(request, prompt, budget), request):
            for choice in json.loads(line[6:])["choices"] if line != "data: [DONE]\n\n" else []:
                if choice["finish_reason"]:
                    finished.append(choice["index"])
                    other.set()
        return finished

    assert asyncio.run(asyncio.wait_for(listen(), timeout=60)) == [1, 0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("in_trace", [False, True])
def test_one_choice_that_fails_ends_the_request_and_the_others(checkpoint, stream, in_trace):
    asked, hanging, cancelled = [], [], []

    class Hangs(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield piece("7")
            await hang()

    async def hang() -> None:
        hanging.append(True)
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def vllm(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if ("allowed_token_ids" in body) != in_trace:
            return completion(TRACE)
        asked.append(body)
        if len(asked) == 2:
            while len(hanging) < 2:
                await asyncio.sleep(0)
            return httpx.Response(500, text="boom")
        if body.get("stream"):
            return httpx.Response(200, stream=Hangs())
        await hang()

    response = ask(checkpoint, vllm, n=3, stream=stream)
    assert "500: boom" in response.text and response.status_code == (200 if stream and not in_trace else 502)
    assert len(cancelled) == 2 and "[DONE]" not in response.text


def test_a_client_that_leaves_a_stream_takes_all_choices_along(checkpoint):
    async def leave() -> None:
        gone, closed = asyncio.Event(), []

        class Hangs(httpx.AsyncByteStream):
            async def __aiter__(self):
                yield piece("7")
                await asyncio.Future()

            async def aclose(self):
                closed.append(True)

        def vllm(request: httpx.Request) -> httpx.Response:
            traced = "allowed_token_ids" in json.loads(request.content)
            return completion(TRACE) if traced else httpx.Response(200, stream=Hangs())

        body = [{"type": "http.request", "body": json.dumps({"messages": [USER], "n": 3, "stream": True}).encode()}]
        seen = []

        async def receive() -> dict:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            seen.append(message.get("body", b"").count(b'"content": "7"'))
            if sum(seen) == 3:
                gone.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
        await chat_app(chat_over(checkpoint, vllm))(scope, receive, send)
        while len(closed) < 3:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), timeout=60))


# What changes an answer


FOR_ANSWERS = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
FOR_ANSWERS |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "stop": ["x", "y"], "ignore_eos": True}


def test_the_answer_is_drawn_as_asked_and_the_trace_as_trained(checkpoint, engine):
    assert ask(checkpoint, engine, **FOR_ANSWERS, temperature=0.7, seed=5).status_code == 200
    assert ask(checkpoint, engine, seed=5).status_code == 200
    [plain, as_asked], [neutral, neither] = engine.answers[::-1], engine.traces
    assert FOR_ANSWERS.items() <= as_asked.items() and as_asked["temperature"] == 0.7
    assert (plain["stop_token_ids"], as_asked["stop_token_ids"]) == ([1], [])  # EOS is one of them
    assert (neutral, plain["temperature"], plain["top_k"]) == (neither, 0.0, 0)


def test_null_is_as_if_it_were_left_out(checkpoint, engine):
    names = [
        *ChatRequest.model_fields,
        *NEUTRAL,
        *LABELS,
        "audio",
        "prediction",
        "web_search_options",
        "no_such_field",
    ]
    fields = dict.fromkeys(set(names) - {"messages", "max_tokens", "stream"})
    assert ask(checkpoint, engine, **fields).json()["choices"] == ask(checkpoint, engine).json()["choices"]
    assert engine.bodies[:2] == engine.bodies[2:]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_name_of_the_limit(checkpoint, engine, name):
    """And the newer one where there are both: lighteval sends the task's and the user's."""
    ask(checkpoint, engine, **{"max_tokens": None, name: 9})
    ask(checkpoint, engine, max_tokens=4, max_completion_tokens=9)
    first, second = engine.answers
    assert first["max_tokens"] == second["max_tokens"] == 7
    refused = ask(checkpoint, engine, **{"max_tokens": None, name: 300}).json()["error"]["message"]
    assert f"{name} 300 exceed the model's 256 positions; shorten the messages or lower {name}" in refused


# Log-probabilities

DRAWN = {"tokens": ["token_id:12", "token_id:7", "token_id:1"], "token_logprobs": [-0.5, -0.25, -0.125]}
DRAWN["top_logprobs"] = [
    {"token_id:12": -0.5, "token_id:9": -0.25, "token_id:8": -9999.0},
    {"token_id:7": -0.25, "token_id:9": -1.5, "token_id:8": -2.5},
    {"token_id:1": -0.125, "token_id:9": -2.0, "token_id:8": -3.0},
]


def with_logprobs(content: dict):
    """vLLM that gives `content` as its answer's log-probabilities, a token an event."""

    def vllm(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if "allowed_token_ids" in body:
            assert body["logprobs"] is None
            return completion(TRACE)
        assert body["logprobs"] == 2 and body["return_tokens_as_token_ids"] is True
        if not body.get("stream"):
            choice = {"text": "xy", "finish_reason": "stop", "logprobs": content}
            return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 3}})
        steps = [{key: values[i : i + 1] for key, values in content.items()} for i in range(3)]
        choices = [
            {"text": text, "finish_reason": finish, "logprobs": step}
            for text, finish, step in zip(("", "xy", ""), (None, None, "stop"), steps, strict=True)
        ]
        events = [f"data: {json.dumps({'choices': [choice]})}\n\n".encode() for choice in choices]
        return httpx.Response(200, stream=Parts(*events, b"data: [DONE]\n\n"))

    return vllm


def test_log_probabilities_are_of_the_answers_tokens(checkpoint):
    """Without the one that ends it; a token whose text comes later has its place in the stream too."""
    fields = {"logprobs": True, "top_logprobs": 2, "messages": [USER], "max_tokens": 30}
    with running(chat_over(checkpoint, with_logprobs(DRAWN))) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        [choice] = client.chat.completions.create(model=NAME, **fields).choices
        events = list(client.chat.completions.create(model=NAME, **fields, stream=True))
    chat = chat_over(checkpoint, None)
    texts = [chat.tokenizer.decode([token]) for token in (12, 7, 9)]
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, first.bytes) == (texts[0], -0.5, [*texts[0].encode()])
    assert (second.token, second.logprob) == (texts[1], -0.25)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [(texts[2], -0.25), (texts[0], -0.5)]
    streamed = [e.choices[0].logprobs.content for e in events if e.choices[0].logprobs]
    assert [part for content in streamed for part in content] == choice.logprobs.content
    assert "".join(e.choices[0].delta.content or "" for e in events) == "xy" == choice.message.content


def test_a_part_of_a_character_has_no_bytes(checkpoint, monkeypatch):
    chat = chat_over(checkpoint, with_logprobs(DRAWN))
    monkeypatch.setattr(type(chat.tokenizer), "decode", lambda *_, **__: "\N{REPLACEMENT CHARACTER}")
    [response] = requests(chat_app(chat), {"messages": [USER], "logprobs": True, "top_logprobs": 2})
    assert response.json()["choices"][0]["logprobs"]["content"][0]["bytes"] is None


def test_no_token_left_no_log_probability(checkpoint, engine):
    [choice] = ask(checkpoint, engine, logprobs=True, max_tokens=1).json()["choices"]
    assert choice["logprobs"] == {"content": [], "refusal": None} and choice["finish_reason"] == "length"
    assert ask(checkpoint, engine).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    "content",
    [
        DRAWN | {"tokens": ["7", "+", "="]},
        DRAWN | {"tokens": ["token_id:12"]},
        DRAWN | {"token_logprobs": [None] * 3},
        DRAWN | {"top_logprobs": [None] * 3},
        DRAWN | {"top_logprobs": [{"token_id:99999999999": -1.0}] * 3},
        [],
    ],
)
def test_log_probabilities_of_another_form_are_502(checkpoint, content):
    response = ask(checkpoint, with_logprobs(content), logprobs=True, top_logprobs=2)
    assert response.status_code == 502 and "the vLLM server behind this one failed" in response.text


# Messages


def prompt_of(engine, checkpoint, *messages: dict) -> list[int]:
    [response] = requests(chat_app(chat_over(checkpoint, engine)), {"messages": list(messages)})
    assert response.status_code == 200, response.text
    return engine.traces[-1]["prompt"]


def test_messages_that_mean_the_same(checkpoint, engine):
    system = {"role": "system", "content": "1+1="}
    plain = prompt_of(engine, checkpoint, system, USER)
    assert plain == prompt_of(engine, checkpoint, system | {"role": "developer"}, USER)
    assert plain == prompt_of(engine, checkpoint, system, USER | {"type": "text"})  # as lm_eval's older versions
    parts = [{"type": "text", "text": "7+"}, {"type": "text", "text": "4-2="}]
    assert plain == prompt_of(engine, checkpoint, system, USER | {"content": parts})


def test_a_reply_can_be_sent_back(client, engine):
    """As the client has it: with its nulls, and the trace, which is dropped."""
    message = client.chat.completions.create(model=NAME, messages=[USER], max_tokens=30).choices[0].message
    plain = {"role": "assistant", "content": message.content}
    for back in (
        message,
        message.model_dump(),
        plain,
        plain | {"reasoning": "x", "annotations": [], "tool_calls": []},
    ):
        client.chat.completions.create(model=NAME, messages=[USER, back, USER], max_tokens=30)
    prompts = [body["prompt"] for body in engine.traces[1:]]
    assert prompts == prompts[:1] * 4 and len(prompts[0]) > len(engine.traces[0]["prompt"])


# Bodies as other programs send them: lm_eval 0.4.13's and an older one's, lighteval 0.13 by litellm, vllm bench serve

TURN = [{"role": "user", "content": "3+4="}]
LM_EVAL = {"messages": [TURN[0] | {"type": "text"}], "model": NAME, "max_tokens": 30, "temperature": 0}
LM_EVAL |= {"stop": ["Question:"], "seed": 1234, "top_p": 0.95}
LIGHTEVAL = {"model": NAME, "messages": TURN, "response_format": {"type": "text"}, "max_tokens": 20, "logprobs": False}
LIGHTEVAL |= {"stop": [], "n": 4, "max_completion_tokens": 30, "temperature": 0.6, "seed": 42, "top_p": 0.95}
LIGHTEVAL |= {"repetition_penalty": 1.05, "frequency_penalty": 0.0}
VLLM_BENCH = {"model": NAME, "messages": [{"role": "user", "content": [{"type": "text", "text": "3+4="}]}]}
VLLM_BENCH |= {"max_completion_tokens": 30, "stream": True, "stream_options": {"include_usage": True}}
VLLM_BENCH |= {"ignore_eos": True, "temperature": 0.0}
AGENTS = {"model": NAME, "messages": [{"role": "developer", "content": "3+"}, *TURN], "parallel_tool_calls": False}
AGENTS |= {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "medium", "max_tokens": 30}
PROGRAMS = {"lm_eval": LM_EVAL, "lighteval": LIGHTEVAL, "vllm bench": VLLM_BENCH, "agents": AGENTS}


@pytest.mark.parametrize("body", PROGRAMS.values(), ids=PROGRAMS)
def test_what_programs_send_is_answered(checkpoint, engine, body):
    [response] = requests(chat_app(chat_over(checkpoint, engine)), body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        contents = [choice["message"]["content"] for choice in response.json()["choices"]]
        assert len(contents) == body.get("n", 1) and all(contents)
        assert len({*contents}) == len(contents)


# The table


def rows() -> list[list[str]]:
    lines = [line for line in README.read_text().splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def fields_in(cell: str) -> list[dict]:
    return [json.loads(f"{{{text}}}") for text in re.findall(r"`([^`]+)`", cell)]


ROWS = rows()


def test_the_table_has_its_rows():
    assert [int(row[0].split(".")[0]) for row in ROWS] == [*range(1, len(ROWS) + 1)] and len(ROWS) >= 20
    taken = {name for row in ROWS for fields in fields_in(row[1]) for name in fields}
    assert {*ChatRequest.model_fields, *LABELS} - {"trace_temperature"} <= taken
    assert {name for name in NEUTRAL if NEUTRAL[name]} <= taken


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_table_says_what_is_so(checkpoint, engine, row):
    """Each example of its second column is answered, each of its third is refused with the fourth's words."""
    bodies = [{"messages": [USER], "max_tokens": 30} | fields for fields in fields_in(row[1])]
    responses = requests(chat_app(chat_over(checkpoint, engine)), *bodies)
    assert [r.text for r in responses if r.status_code != 200] == [] and responses
    bodies = [{"messages": [USER], "max_tokens": 30} | fields for fields in fields_in(row[2])]
    responses = requests(chat_app(chat_over(checkpoint, engine)), *bodies)
    for response in responses:
        error = response.json()["error"]
        assert response.status_code in (400, 404) and row[3] in error["message"], error
        assert error["param"] in (error["message"].split(":")[0], "messages")


@pytest.mark.parametrize("name", NEUTRAL)
def test_other_values_are_refused_by_name(client, name):
    """By the real client's exception; `true` where 1 is neutral too."""
    for value in (["x"], 7, *([True] if NEUTRAL[name] != (True, False) else [])):
        if any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
            continue
        with pytest.raises(BadRequestError, match=re.escape(f"{name}: {value!r} is not supported: ")) as error:
            client.chat.completions.create(model=NAME, messages=[USER], extra_body={name: value})
        assert error.value.param == name


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_a_deep_value_is_refused_and_not_an_error(checkpoint, engine, depth):
    body = f'{{"messages": [{json.dumps(USER)}], "tools": {"[" * depth}{"]" * depth}}}'.encode()
    with pytest.raises(Exception, match="tools: |not valid JSON") as error:
        parse_request(body)
    assert type(error.value).__name__ == "ApiError"
