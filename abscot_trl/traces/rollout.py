"""
GRPO's rollouts: TRL's generation backend with the constrained sampler inside (section 3.3, stage 2).

A rollout is z ~ pi_abs(. | x), then y ~ pi(. | x, z~), by the same [`EngineTraceSampler`] that offline sampling uses;
the completion that the trainer sees is [z; <endabstract>; y]. All else (server or colocate, tensor parallelism, sleep,
weight sync under FSDP and DeepSpeed) is TRL's.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

from abscot_trl.errors import Refused
from abscot_trl.traces.constraint import Trace
from abscot_trl.traces.server import check_server, complete_there, served_model
from abscot_trl.traces.vllm import (
    Completions,
    EngineTraceSampler,
    check_runner,
    check_tensor_parallel,
    complete_here,
    row_seed,
)
from abscot_trl.vocabulary import AbstractVocabulary

NEUTRAL = {
    "top_p": [1],
    "top_k": [0, -1, None],
    "min_p": [0, None],
    "repetition_penalty": [1],
    "structured_outputs_regex": [None],
    "logprobs": [0],
    "generation_kwargs": [{}],
}
PEFT_MARKERS = (
    "base_model.",
    "base_layer",
    "lora_",
    "original_module",
    "modules_to_save",
    "token_adapter",
    "trainable_tokens",
)


@contextmanager
def unchanged(model: PeftModel) -> Iterator[None]:
    """
    The weights under LoRA are afterwards what they were, bit for bit. The parent merges and unmerges them, and in
    bfloat16 W + BA - BA is not W: over hundreds of syncs the frozen base, which is the reference too, drifts away.
    """
    weights = [module.get_base_layer().weight for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [weight.detach().to("cpu", copy=True) for weight in weights]  # on the device they would not fit beside vLLM
    yield
    for weight, before in zip(weights, kept, strict=True):
        weight.data.copy_(before)


def settled(parameter: Tensor) -> Tensor:
    """A finished copy: vLLM packs on streams of its own, which do not wait for each other."""
    parameter = parameter.clone()
    if parameter.is_cuda:
        torch.cuda.current_stream().synchronize()
    return parameter


def settle_port() -> None:
    """
    A free port for vLLM's process group, where no launcher has set one. trl takes 29500 if that is free when it looks,
    and an engine binds it seconds later: of two runs that start on one machine the second would fail.
    """
    if not os.environ.get("MASTER_PORT"):
        with socket.socket() as free:
            free.bind(("", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


def check_room(max_completion_length: int, m_max: int) -> None:
    """
    Raises:
        Refused: no room for an answer of one token after a trace of `m_max` and its end delimiter.
    """
    if max_completion_length < m_max + 2:
        raise Refused(
            f"max_completion_length {max_completion_length} leaves no room for an answer after a trace of m_max "
            f"{m_max} and its end delimiter; use {m_max + 2} at least"
        )


def random_traces(traces: list[list[int]], codebook: list[int], seed: int, rows: list[int]) -> list[list[int]]:
    """Codebook tokens drawn uniformly, as many as each trace holds; a row's draw is its own."""
    draws = [np.random.default_rng([seed, row, 2]) for row in rows]
    return [rng.choice(codebook, len(trace)).tolist() for rng, trace in zip(draws, traces, strict=True)]


def trace_and_answer(
    sampler,
    prompts: list[list[int]],
    vocabulary: AbstractVocabulary,
    room: int,
    temperatures: tuple[float, float],
    seed: int,
    rows: list[int],
    random: bool = False,
) -> tuple[list[Trace], list[list[int]], list]:
    """
    z ~ pi_abs(. | x), then y ~ pi(. | x, z) (section 3.3).

    Args:
        sampler: of transformers or of an engine.
        prompts (`list[list[int]]`): token ids that end in the begin delimiter.
        room (`int`): tokens of z, its end delimiter and y.
        temperatures: of z and of y; 0 is greedy.
        rows (`list[int]`): the rows' numbers; with `seed` they fix the draws.
        random (`bool`): a random trace of its length takes the place of each.

    Returns:
        the traces; [z; <endabstract>] of each, as ids; the answers, as the sampler's `complete_answers` gives them.
    """
    prefixes = [prompt[:-1] for prompt in prompts]  # the sampler adds the begin delimiter
    traces = sampler.sample(prefixes, vocabulary.m_max, vocabulary.m_min, temperatures[0], seed, rows)
    if random:
        swapped = random_traces([trace.token_ids for trace in traces], sampler.codebook, seed, rows)
        traces = [Trace(ids, [0.0] * len(ids)) for ids in swapped]
    heads = [[*trace.token_ids, sampler.end] for trace in traces]
    given = [[*prompt, *head] for prompt, head in zip(prompts, heads, strict=True)]
    return traces, heads, sampler.complete_answers(given, room - vocabulary.m_max - 1, temperatures[1], seed, rows)


class AbstractVLLMGeneration(VLLMGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] whose completions are [z; <endabstract>; y].

    Args:
        args, kwargs: the parent's. `max_completion_length` counts z, its end delimiter and y.
        vocabulary ([`AbstractVocabulary`], *optional*): the codebook; read from the model's checkpoint when left out.
        m_max, m_min (`int`, *optional*): most and fewest codebook tokens; the vocabulary's when left out.
        trace_temperature (`float`, *optional*): of z; `temperature`, which is then of y alone, when left out.
        seed (`int`, *optional*, defaults to `0`): with the number of the call (`calls`, kept here) and of the row it
            fixes a rollout, however many processes there are and whichever mode.

    Raises:
        Refused: settings that change the sampled distribution, which the trainer's log-probabilities could not
            mirror, a `max_completion_length` without room for an answer, a `tensor_parallel_size` that does not divide
            the heads; or a server as in [`ServerTraceSampler`];
            the model's checkpoint holds no vocabulary.
    """

    def __init__(
        self,
        *args,
        vocabulary: AbstractVocabulary | None = None,
        m_max: int | None = None,
        m_min: int | None = None,
        trace_temperature: float | None = None,
        seed: int = 0,
        **kwargs,
    ):
        self.vocabulary, self.m_max, self.m_min = vocabulary, m_max, m_min
        self.trace_temperature = trace_temperature
        self.seed, self.calls, self.swap = seed, 0, "own"
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        path = self.model.name_or_path  # a PeftModel's is its base model's
        self._settle_vocabulary(path)
        self._check_settings(path)
        if self.mode == "colocate":
            settle_port()
        super()._init_vllm()
        if self.mode == "colocate":
            check_runner(self.llm.llm_engine.vllm_config, path, self.vocabulary)
            complete, positions = partial(complete_here, self.llm), self.llm.model_config.max_model_len
        elif self.accelerator.is_main_process:
            check_server(self.vllm_client, self.end, self.vocabulary.end)
            complete = partial(complete_there, self.vllm_client)
            positions = served_model(self.vllm_client.base_url)["max_model_len"]
        else:
            return  # the main process samples for all
        self.sampler = EngineTraceSampler(complete, path, self.vocabulary, positions, tokenizer=self.processing_class)

    def _settle_vocabulary(self, path: str) -> None:
        vocabulary = self.vocabulary or AbstractVocabulary.load(path)
        limits = {"m_max": self.m_max, "m_min": self.m_min}
        self.vocabulary = replace(vocabulary, **{name: n for name, n in limits.items() if n is not None})
        self.m_max, self.m_min = self.vocabulary.m_max, self.vocabulary.m_min
        self.begin = self.vocabulary.begin_id(self.processing_class)
        self.end = self.vocabulary.end_id(self.processing_class)

    def _check_settings(self, path: str) -> None:
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            if value not in neutral:
                raise Refused(
                    f"{name}: {value!r} changes what is sampled or returned, and the trainer's log-probabilities "
                    "know the trace constraint and the temperature only; leave it out"
                )
        check_room(self.max_completion_length, self.m_max)
        if self.mode == "colocate":
            check_tensor_parallel(path, self.tensor_parallel_size)

    def generate(
        self, prompts: list[list[int]], images: list[list | None] | None, num_generations: int, profiler=None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """
        One rollout a prompt; a prompt that stands there K times gets K different ones.

        Args:
            prompts (`list[list[int]]`): token ids that end in the begin delimiter, as many on each process.
            images: refused.
            num_generations (`int`): not needed, each row has a seed of its own.

        Returns:
            prompt ids, completion ids (with EOS where y ended), their log-probabilities at the temperature (pi_abs on
            z and its end delimiter, 0 where forced; pi on y, which holds no reserved token) and again their ids, the
            last two of shape (B, L, 1).

        Raises:
            Refused: images, a prompt without the begin delimiter or without room for trace and answer.
        """
        if any(images or []):
            raise Refused("abstract traces are sampled from text prompts; remove the images from the dataset")
        for prompt in prompts:
            if prompt[-1:] != [self.begin]:
                raise Refused(
                    f"a prompt ends in token {prompt[-1:]} and not in {self.vocabulary.begin} [{self.begin}]; "
                    "the chat template's generation prompt must end in it"
                )
        seed = row_seed(self.seed, self.calls)
        self.calls += 1
        sample = self._sample_there if self.mode == "server" else self._sample_here
        rollouts = sample(prompts, seed, profiler or nullcontext())
        completion_ids = [ids for ids, _ in rollouts]
        logprobs = [[[logp] for logp in logps] for _, logps in rollouts]
        return prompts, completion_ids, logprobs, [[[token] for token in ids] for ids in completion_ids]

    @contextmanager
    def probing(self, swap: str) -> Iterator[None]:
        """Greedy rollouts, after the `own` traces or `random` ones of their lengths."""
        kept = self.temperature, self.trace_temperature, self.swap
        self.temperature, self.trace_temperature, self.swap = 0.0, 0.0, swap
        try:
            yield
        finally:
            self.temperature, self.trace_temperature, self.swap = kept

    def _rollouts(self, prompts: list[list[int]], first_row: int, seed: int) -> Completions:
        """z, then y after it. Rows are numbered over all processes."""
        rows = list(range(first_row, first_row + len(prompts)))
        hot = (self.temperature if self.trace_temperature is None else self.trace_temperature), self.temperature
        found = trace_and_answer(
            self.sampler, prompts, self.vocabulary, self.max_completion_length, hot, seed, rows, self.swap == "random"
        )
        return [
            (head + ids, [*trace.logps, trace.end_logp, *logps])
            for trace, head, (ids, logps) in zip(*found, strict=True)
        ]

    def _sample_there(self, prompts: list[list[int]], seed: int, profiler) -> Completions:
        """The main process asks the server for everybody's rollouts; each process takes its own."""
        everybodys, rollouts = gather_object(prompts), [None]
        if self.accelerator.is_main_process:
            with profiler:
                rollouts = [self._rollouts(everybodys, 0, seed)]
        broadcast_object_list(rollouts, from_process=0)
        first = self.accelerator.process_index * len(prompts)
        return rollouts[0][first : first + len(prompts)]

    def _sample_here(self, prompts: list[list[int]], seed: int, profiler) -> Completions:
        """Each tensor-parallel group samples all its prompts on all its ranks; each rank keeps its own."""
        size, n = self.tensor_parallel_size, len(prompts)
        rank, groups = self.accelerator.process_index % size, [prompts]
        with self._awake():
            if size > 1:
                groups = [None] * size
                torch.distributed.all_gather_object(groups, prompts, group=self.tp_group)
                if is_peft_model(self.model):  # trl#3671: drain NCCL before vLLM's own collectives
                    torch.distributed.barrier(device_ids=[self.accelerator.local_process_index])
            with profiler:
                first_row = (self.accelerator.process_index - rank) * n
                rollouts = self._rollouts([prompt for group in groups for prompt in group], first_row, seed)
        return rollouts[rank * n : (rank + 1) * n]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Both calls in one waking: sleep discards the weights, so each waking costs a sync."""
        if not self.enable_sleep_mode:
            yield
            return
        if self._llm_weights_sleeping:
            self.sync_weights()
        self.llm.wake_up(tags=["kv_cache"])
        yield
        self.llm.sleep(level=2)
        self._llm_weights_sleeping = True

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """
        The parent's, with trained token rows: they are merged into the embedding, which goes by its own name. For a
        server copies, because vLLM packs up to 1 GB of them at a time: the last pack is made after the parent has
        unmerged the adapter (or freed what it gathered), and would hold the weights without it.

        Raises:
            RuntimeError: a name that is still peft's, which vLLM does not know.
        """
        with unchanged(self.model) if is_peft_model(self.model) else nullcontext():
            for name, parameter in super()._iter_named_params():
                if ".trainable_tokens_delta." in name:
                    continue
                name = name.replace(".token_adapter.", ".")
                if any(marker in name for marker in PEFT_MARKERS):
                    raise RuntimeError(f"{name} is a name of peft's that vLLM does not know; its weights went nowhere")
                yield name, settled(parameter) if self.mode == "server" else parameter
