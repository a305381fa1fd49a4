"""What tests of the chat API share: an app over a function that stands for vLLM, and requests to it."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
from transformers import AutoTokenizer

from abscot_trl.serving.chat import Chat
from abscot_trl.serving.server import ChatServer, bind
from abscot_trl.vocabulary import AbstractVocabulary

NAME = "tiny"
USER = {"role": "user", "content": "7+4-2="}
TRACE = [40, 49]  # a codebook token and the end delimiter


def requests(app, *bodies: dict) -> list[httpx.Response]:
    """Chat requests to an app of this process."""

    async def post() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.post("/v1/chat/completions", json=body) for body in bodies]

    return asyncio.run(post())


def chat_over(checkpoint, upstream) -> Chat:
    """The protocol over a function that stands for vLLM."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(upstream), base_url="http://vllm")
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(checkpoint), AbstractVocabulary.load(checkpoint)
    return Chat(client, NAME, tokenizer, vocabulary, 256, [1])


def completion(ids: list[int], finish: str = "stop") -> httpx.Response:
    choice = {"text": "x" * len(ids), "token_ids": ids, "finish_reason": finish}
    return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": len(ids)}})


def piece(text: str, finish: str | None = None) -> bytes:
    content = {"choices": [{"text": text, "finish_reason": finish}]}
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


class Parts(httpx.AsyncByteStream):
    """A stream in parts, which may end with an exception, or never (`None`)."""

    def __init__(self, *parts):
        self.parts = parts

    async def __aiter__(self):
        for part in self.parts:
            if part is None:
                await asyncio.Future()
            if isinstance(part, Exception):
                raise part
            yield part


@contextmanager
def running(chat: Chat):
    """`ChatServer` on loopback, in a thread: it, and its url."""
    with bind("127.0.0.1", 0) as listener:
        server = ChatServer(chat)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
