"""
`abscot serve`: a trained checkpoint behind OpenAI's chat API (`serving/`), over a plain `vllm serve`.

vLLM runs as a child on a loopback port, or elsewhere (`upstream`). The child is stopped with this process, and this
process stops, with an error, when the child dies.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import httpx
import uvicorn

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.serving.chat import Chat, chat_app
from abscot_trl.traces.backends import engine_arguments
from abscot_trl.traces.vllm import ServerTraceSampler, check_tensor_parallel
from abscot_trl.vocabulary import AbstractVocabulary

OURS = ("config", "host", "logprobs_mode", "model", "port", "served_model_name", "trust_remote_code")
GRACE = 20  # seconds that a child has to stop by itself
PR_SET_PDEATHSIG = 1


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
    served_model_name: str | None = field(default=None, metadata={"help": "The model's name in the API."})

    def __post_init__(self):
        self.engine = engine_arguments(self.engine)
        if self.upstream is not None and (self.engine or self.served_model_name):
            raise Refused("engine and served_model_name are the upstream's own; give them to its `vllm serve`")
        if self.upstream is not None and not self.upstream.startswith(("http://", "https://")):
            raise Refused(f"upstream: {self.upstream!r} is no address; write http://host:port")
        if self.trace_temperature < 0:
            raise Refused(f"trace_temperature must not be negative, got {self.trace_temperature}; 0 is greedy")


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


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent is killed without a chance to stop it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class VLLMServer:
    """A `vllm serve` of our own, with its workers in one process group; its log is passed on to stderr."""

    def __init__(self, args: ServeArguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.tail = f"http://127.0.0.1:{port}", deque(maxlen=15)
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model, "--host=127.0.0.1"]
        command += [f"--port={port}", f"--served-model-name={args.served_model_name or args.model}"]
        command += ["--logprobs-mode=processed_logprobs", "--enable-prefix-caching", "--disable-uvicorn-access-log"]
        self.process = subprocess.Popen(
            [*command, *engine_flags(args.engine)],
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
            Refused: the child has ended; with the end of its log.
        """
        code = self.process.poll()
        if code is not None:
            self.log.join(timeout=1)
            raise Refused(f"vllm serve ended with exit code {code}; the end of its log: {''.join(self.tail)}")

    def wait_until_healthy(self) -> None:
        while True:
            self.check()
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).is_success:
                    return
            time.sleep(0.2)

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
        ConnectionError, ValueError: as [`ServerTraceSampler`].
    """
    vocabulary, tokenizer = AbstractVocabulary.load(args.model), load_tokenizer(args.model)
    sampler = ServerTraceSampler(url, args.model, vocabulary)
    client = httpx.AsyncClient(
        base_url=url,
        timeout=httpx.Timeout(None, connect=10),
        # vLLM closes an idle connection after 5 s; one that it is just closing must not be used again
        limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        trust_env=False,
    )
    name = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    return Chat(client, name, tokenizer, vocabulary, sampler.positions, sampler.stops, args.trace_temperature)


def listen(args: ServeArguments, listener: socket.socket, url: str, child: VLLMServer | None) -> None:
    """Serve until a signal comes or the child dies."""
    app = chat_app(load_chat(args, url))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))

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
            the address is in use, or nothing answers at `upstream`;
            vLLM died; with the end of its log.
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
