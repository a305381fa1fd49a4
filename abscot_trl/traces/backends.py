"""Who samples: transformers, a vLLM engine in this process, or a server. All three give the same distribution."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_model
from abscot_trl.errors import Refused
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.traces.server import ServerTraceSampler
from abscot_trl.traces.vllm import VLLMTraceSampler
from abscot_trl.vocabulary import AbstractVocabulary


def engine_arguments(engine: dict | str | None) -> dict:
    """
    A field `engine` as a mapping: a recipe gives one, a command line its JSON.

    Raises:
        Refused: neither, or it asks for remote code, or for no number of processes.
    """
    if isinstance(engine, str):
        try:
            engine = json.loads(engine)
        except json.JSONDecodeError as error:
            raise Refused(f"engine: {engine!r} is no JSON object ({error})") from error
    if not isinstance(engine, dict | None):
        raise Refused(f"engine: {engine!r} is no mapping of vLLM's arguments")
    if "trust_remote_code" in (engine or {}):
        raise Refused("engine: trust_remote_code is never set here; leave it out")
    for name in ("data_parallel_size", "tensor_parallel_size"):
        value = (engine or {}).get(name, 1)
        if type(value) is not int or value < 1:
            raise Refused(f"engine: {name}: {value!r:.80} is no number of processes")
    return engine or {}


@dataclass(kw_only=True)
class SamplerArguments:
    """
    Fields of every phase that samples.

    Args:
        backend (`str`): `hf`, `vllm` (an engine of this process) or `server` (a running `vllm serve`).
        engine (`dict`, *optional*): keyword arguments of `vllm.LLM`, such as `{tensor_parallel_size: 2}`.
        server (`str`, *optional*): `http://host:port` of the server.
        batch_tokens (`int`): most tokens of one batch of `hf`; vLLM batches by itself.
        dtype (`str`): of the weights.
    """

    backend: str = field(
        default="hf", metadata={"help": "Who samples: hf, vllm or server.", "choices": ["hf", "vllm", "server"]}
    )
    engine: dict | str | None = field(
        default=None, metadata={"help": "Arguments of vllm.LLM, e.g. '{\"tensor_parallel_size\": 2}'."}
    )
    server: str | None = field(default=None, metadata={"help": "http://host:port of a running server."})
    batch_tokens: int = field(default=65536, metadata={"help": "Most tokens of one batch (hf)."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights."})

    def __post_init__(self):
        self.engine = engine_arguments(self.engine) or None
        if self.engine and self.backend != "vllm":
            raise Refused(f"engine is for backend: vllm, not {self.backend}; leave it out")
        if (self.server is not None) != (self.backend == "server"):
            raise Refused(f"server and backend: server go together, got {self.server!r} and {self.backend!r}")
        if self.batch_tokens < 1:
            raise Refused(f"batch_tokens must be at least 1, got {self.batch_tokens}")


def load_sampler(
    args: SamplerArguments, model: str, tokenizer: PreTrainedTokenizerBase, vocabulary: AbstractVocabulary | None
) -> HFTraceSampler | VLLMTraceSampler | ServerTraceSampler:
    """
    The sampler of `args.backend` for a checkpoint; without a vocabulary it answers, but writes no traces.

    Raises:
        Refused: an adapter that was not merged (its token rows would be left out).
    """
    if (Path(model) / "adapter_config.json").is_file():
        raise Refused(f"{model} is an adapter; run `abscot merge --adapter {model} --output_dir ..` first")
    if args.backend == "server":
        return ServerTraceSampler(args.server, model, vocabulary)
    if args.backend == "vllm":
        return VLLMTraceSampler(model, vocabulary, **{"dtype": args.dtype} | (args.engine or {}))
    weights = load_model(model, args.dtype, device_map="auto")
    return HFTraceSampler(weights, tokenizer, vocabulary, args.batch_tokens)
