"""
`abscot serve`: a trained checkpoint behind OpenAI's chat API (`serving/`), over a plain `vllm serve`.

vLLM runs as a child on a loopback port, or elsewhere (`upstream`). The child is stopped with this process, and this
process stops, with an error, when the child dies.
"""

import asyncio
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Thread
from typing import Any

import httpx
import uvicorn

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.serving.chat import Chat, chat_app
from abscot_trl.traces.backends import engine_arguments
from abscot_trl.traces.server import ServerTraceSampler, served_model, weights_digest
from abscot_trl.traces.vllm import check_tensor_parallel, engine_settings, needs_older_runner
from abscot_trl.vocabulary import AbstractVocabulary

OURS = ("config", "host", "logprobs_mode", "model", "port", "served_model_name", "trust_remote_code")
GRACE = 20  # seconds that a child has to stop by itself
PATIENCE = 5  # seconds that requests have to end after a signal, before they are refused
PR_SET_PDEATHSIG = 1
# Of vLLM's log: who writes a line and where, and a line that ends a traceback or names a wrong flag.
ORIGIN = re.compile(r"(\(.+? pid=\d+\) )?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[.+?\] ?)?")
RAISED = re.compile(r"([A-Za-z_][\w.]*(Error|Exception)|\S+\.py: error): \S")


@dataclass
class ServeArguments:
    """
    Serve a checkpoint.

    Args:
        model (`str`): an extended, merged checkpoint.
        host, port (`str`, `int`): where to listen.
        upstream (`str`, *optional*): a running `vllm serve` of the same checkpoint; started as a child when left out.
        engine (`dict`, *optional*): arguments of that child, such as `{tensor_parallel_size: 2}`.
        trace_temperature (`float`): of the trace where a request gives none; 0 decodes greedily.
        timeout (`float`): seconds without a word of vLLM after which a request is given up. An answer that is not
            streamed is silent until its end.
        served_model_name (`str`, *optional*): the model's name in the API; `model` as given when left out.
    """

    model: str = field(metadata={"help": "Folder of an extended, merged checkpoint."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    upstream: str | None = field(
        default=None,
        metadata={"help": "http://host:port of a running vllm serve of this checkpoint; none: start one."},
    )
    engine: dict | str | None = field(
        default=None, metadata={"help": "Arguments of vllm serve, e.g. '{\"tensor_parallel_size\": 2}'."}
    )
    trace_temperature: float = field(default=0.0, metadata={"help": "Of the trace; 0 decodes greedily."})
    timeout: float = field(default=1800.0, metadata={"help": "Most seconds that vLLM may be silent in a request."})
    served_model_name: str | None = field(default=None, metadata={"help": "The model's name in the API."})

    def __post_init__(self):
        self.engine = engine_arguments(self.engine)
        if self.upstream is not None and (self.engine or self.served_model_name):
            raise Refused("engine and served_model_name are the upstream's own; give them to its `vllm serve`")
        if self.upstream is not None and not self.upstream.startswith(("http://", "https://")):
            raise Refused(f"upstream: {self.upstream!r} is no address; write http://host:port")
        if self.trace_temperature < 0:
            raise Refused(f"trace_temperature must not be negative, got {self.trace_temperature}; 0 is greedy")
        if not self.timeout > 0:
            raise Refused(f"timeout must be positive, got {self.timeout}; it is in seconds")


def engine_flags(engine: dict[str, Any]) -> list[str]:
    """
    `{tensor_parallel_size: 2, enforce_eager: true}` as `--tensor-parallel-size=2 --enforce-eager`.

    Raises:
        Refused: an argument that is set here, or none.
    """
    flags = []
    for name, value in engine.items():
        flag = str(name).replace("_", "-")
        if flag.replace("-", "_") in OURS or value is None:
            why = "has no value" if value is None else "is not for vllm serve's command line here"
            raise Refused(f"engine: {name} {why}; leave it out")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def root_cause(log: Iterable[str]) -> str | None:
    """
    What vLLM's log says first of all: the end of its first traceback, or the flag that is wrong. The tracebacks after
    it, of the processes above, only say that one has failed.
    """
    lines = [ORIGIN.sub("", line, count=1).rstrip() for line in log]
    ends = [i for i, line in enumerate(lines) if RAISED.match(line)]
    for i, following in pairwise([*ends, len(lines)]):
        if "During handling of the above exception, another exception occurred:" in lines[i + 1 : following]:
            continue  # this one was caught
        details = []
        for line in lines[i + 1 : following]:  # pydantic's go on
            if not line.startswith("  ") or line.lstrip().startswith(("File ", "For further")):
                break
            details.append(line.split(" [type=")[0].strip())
        return " ".join([lines[i], *details])[:1000]
    return None


def remedy(cause: str) -> str:
    """For a vLLM that did not start: the share of the memory that is there, if that was the cause."""
    if memory := re.search(r"\(([\d.]+)/([\d.]+) GiB\)", cause):
        free, total = map(float, memory.groups())
        share = int(95 * free / total) / 100
        return f"free memory, or take less of it by --engine '{{\"gpu_memory_utilization\": {share}}}'"
    return "mend `engine` (its names are those of vLLM's arguments) or `model`"


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent is killed without a chance to stop it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class VLLMServer:
    """A `vllm serve` of our own, with its workers in one process group; its log is passed on to stderr."""

    def __init__(self, args: ServeArguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.tail, self.up = f"http://127.0.0.1:{port}", deque(maxlen=1000), False
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model, "--host=127.0.0.1"]
        command += [f"--port={port}", f"--served-model-name={args.served_model_name or args.model}"]
        command += ["--logprobs-mode=processed_logprobs", "--disable-uvicorn-access-log"]
        older = needs_older_runner(AbstractVocabulary.load(args.model))
        self.process = subprocess.Popen(
            [*command, *engine_flags(engine_settings(args.engine))],
            env=({"VLLM_USE_V2_MODEL_RUNNER": "0"} if older else {}) | os.environ,  # a request would kill the newer
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self.log = Thread(target=self._pass_on, daemon=True)
        self.log.start()

    def _pass_on(self) -> None:
        for line in self.process.stdout:
            self.tail.append(line)
            sys.stderr.write(line)

    def check(self) -> None:
        """
        Raises:
            Refused: the child has ended; with the root cause by its log and the remedy, or the end of its log.
        """
        code = self.process.poll()
        if code is None:
            return
        self.log.join(timeout=1)
        if cause := root_cause(self.tail):
            more = "its log tells more" if self.up else remedy(cause)
            raise Refused(f"vllm serve ended with exit code {code}: {cause}; {more}")
        killed = ", as when memory runs out" if code == -signal.SIGKILL else ""
        end = " ".join("".join([*self.tail][-15:]).split())
        raise Refused(f"vllm serve ended with exit code {code}{killed}; the end of its log: {end}")

    def wait_until_healthy(self) -> None:
        while not self.up:
            self.check()
            time.sleep(0.2)
            with suppress(httpx.TransportError):
                self.up = httpx.get(f"{self.url}/health", trust_env=False).is_success

    def stop(self) -> None:
        """End the child and whatever it left behind; a second signal does not interrupt this."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def bind(host: str, port: int) -> socket.socket:
    """
    The listening address, taken before vLLM starts; connections are refused until the server is up.

    Raises:
        Refused: it is in use, or not ours.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise Refused(f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port") from error
    return listener


def load_chat(args: ServeArguments, url: str) -> Chat:
    """
    The protocol over the upstream at `url`, once it is known to serve the same checkpoint.

    Raises:
        Refused: as [`ServerTraceSampler`].
    """
    vocabulary, tokenizer = AbstractVocabulary.load(args.model), load_tokenizer(args.model)
    sampler = ServerTraceSampler(url, args.model, vocabulary)
    client = httpx.AsyncClient(
        base_url=url,
        timeout=httpx.Timeout(args.timeout, connect=10, pool=None),
        # vLLM closes an idle connection after 5 s; one that it is just closing must not be used again
        limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        trust_env=False,
    )
    name, digest = served_model(url)["id"], weights_digest(args.model)
    limits = sampler.positions, sampler.stops
    return Chat(client, name, tokenizer, vocabulary, *limits, args.trace_temperature, digest)


class ChatServer(uvicorn.Server):
    """Waits, once a signal has come, for the requests under way; those that take too long are told."""

    def __init__(self, chat: Chat):
        super().__init__(
            uvicorn.Config(chat_app(chat), log_level="warning", timeout_graceful_shutdown=PATIENCE + GRACE)
        )
        self.closing = chat.closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(PATIENCE, self.closing.set)
        await super().shutdown(sockets)


def listen(args: ServeArguments, listener: socket.socket, url: str, child: VLLMServer | None) -> None:
    """Serve until a signal comes or the child dies."""
    server = ChatServer(load_chat(args, url))

    def stop_with_child() -> None:
        child.process.wait()
        server.should_exit = True

    if child is not None:
        Thread(target=stop_with_child, daemon=True).start()
    host, port = listener.getsockname()[:2]
    print(f"abscot serve: {args.model} on http://{host}:{port}/v1", file=sys.stderr, flush=True)  # noqa: T201
    server.run(sockets=[listener])  # raises the signal that ended it again
    if child is not None:
        child.check()


def serve(args: ServeArguments) -> None:
    """
    `abscot serve`: returns by exit code 0 on SIGINT and SIGTERM.

    Raises:
        Refused: not an extended checkpoint, or arguments that cannot be;
            the address is in use, or nothing answers at `upstream`, or it serves something else;
            vLLM died; with the root cause by its log.
    """
    AbstractVocabulary.load(args.model)
    check_tensor_parallel(args.model, args.engine.get("tensor_parallel_size", 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with bind(args.host, args.port) as listener:
        if args.upstream is not None:
            listen(args, listener, args.upstream.rstrip("/"), None)
            return
        child = VLLMServer(args)
        try:
            child.wait_until_healthy()
            listen(args, listener, child.url, child)
        finally:
            child.stop()
