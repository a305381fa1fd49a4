"""
Traces and answers by vLLM: built-in sampling parameters only, token ids in and out.

Two calls a problem. The trace: `allowed_token_ids` is the constraint, `min_tokens` keeps the end delimiter out until
m_min, `max_tokens` forces it; with `logprobs_mode="processed_logprobs"` vLLM's log-probabilities are those of the
renormalised policy at the sampling temperature. The answer: plain decoding after prefix, trace and end delimiter, for
which prefix caching spares the prompt. An engine in this process and a server (`traces/server.py`) take the same
parameters and give the same draws.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_config, load_tokenizer
from abscot_trl.errors import Refused
from abscot_trl.traces.constraint import Continuation, Trace, check_answer_request, check_request, stop_ids
from abscot_trl.vocabulary import FILE_NAME, AbstractVocabulary

MOST_ALLOWED = 1024  # ids that vLLM's newer model runner (of GPUs) can be constrained to
Completions = list[tuple[list[int], list[float]]]  # a prompt: token ids, and their log-probabilities
Complete = Callable[[list[list[int]], list[dict], tqdm | None], Completions]


def sampling_parameters(max_tokens: int, temperature: float, stops: list[int], seed: int | None, **fields) -> dict:
    """
    Names and values that `vllm.SamplingParams` and the completions endpoint share. All neutral ones are said: a server
    would otherwise take top-k, top-p and penalties from the checkpoint's `generation_config.json`.
    """
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}
    request = {"max_tokens": max_tokens, "temperature": temperature, "stop_token_ids": stops, "seed": seed}
    return neutral | request | fields


def trace_parameters(
    codebook: list[int], end: int, m_max: int, m_min: int, temperature: float, seed: int | None = None
) -> dict:
    """z ~ pi_abs: the policy renormalised over V_abs and `<endabstract>` (section 3.3, `traces/constraint.py`)."""
    allowed = {"allowed_token_ids": [*codebook, end], "min_tokens": m_min}
    return sampling_parameters(m_max, temperature, [end], seed, **allowed)


def without(barred: list[int]) -> dict:
    """The tokens `barred` are not drawn: a logit's lowest bias in this API, e^(-100 / temperature) of its odds."""
    return {"logit_bias": dict.fromkeys(barred, -100.0)} if barred else {}


def row_seed(*numbers: int) -> int:
    """A request's seed, from the run's, the row's number and the call's."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def to_trace(ids: list[int], logps: list[float], end: int, m_max: int) -> Trace:
    """
    What vLLM returned as a [`Trace`]; the forced end delimiter is not among `ids`.

    Raises:
        RuntimeError: vLLM stopped for another reason than the delimiter or m_max (an aborted request).
    """
    if ids and ids[-1] == end:
        return Trace(ids[:-1], logps[:-1], logps[-1], forced_end=False)
    if len(ids) != m_max:
        raise RuntimeError(f"vLLM stopped after {len(ids)} of {m_max} trace tokens without <endabstract>")
    return Trace(ids, logps, 0.0, forced_end=True)


def needs_older_runner(vocabulary: AbstractVocabulary) -> bool:
    """Whether a request allows or bars more ids, the delimiters among them, than vLLM's newer model runner takes."""
    return vocabulary.size + 2 > MOST_ALLOWED


def check_runner(config, model_path: str, vocabulary: AbstractVocabulary | None) -> None:
    """
    Args:
        config: an engine's `VllmConfig`.

    Raises:
        Refused: a request that allows or bars so many tokens would kill the engine.
    """
    if config.use_v2_model_runner and vocabulary and needs_older_runner(vocabulary):
        raise Refused(
            f"{model_path} has {vocabulary.size} abstract tokens, vLLM's model runner takes {MOST_ALLOWED - 2} at "
            "most; set VLLM_USE_V2_MODEL_RUNNER=0 for the older one, or sample by transformers"
        )


def check_tensor_parallel(model_path: str, size: int) -> None:
    """
    Raises:
        Refused: `size` does not divide the attention heads; the message names the sizes that do.
    """
    heads = load_config(model_path).num_attention_heads
    if size < 1 or heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise Refused(
            f"tensor_parallel_size {size} does not divide the {heads} heads of {model_path}; use one of {fitting}"
        )


def engine_settings(engine: dict) -> dict:
    """
    `engine` after our defaults. On CPU no prefill is cut in two: vLLM then takes back the draw of a seeded request,
    which torch's CPU generator cannot, and the engine dies.

    Raises:
        Refused: an argument that cuts prefills on CPU.
    """
    from vllm.platforms import current_platform  # takes seconds

    settings, engine = {"enable_prefix_caching": True}, {name.replace("-", "_"): engine[name] for name in engine}
    if current_platform.is_cpu():
        settings["enable_chunked_prefill"] = False
        for name in ("enable_chunked_prefill", "long_prefill_token_threshold"):
            if engine.get(name):
                raise Refused(f"engine: {name} {engine[name]} cuts prefills, which kills vLLM on CPU; leave it out")
    return settings | engine


def own_vocabulary(model_path: str) -> AbstractVocabulary | None:
    """The checkpoint's codebook, if it was extended."""
    return AbstractVocabulary.load(model_path) if (Path(model_path) / FILE_NAME).is_file() else None


class _Bar(SimpleNamespace):
    """vLLM makes a progress bar of its own: it gets this one, which moves ours."""

    n, postfix, format_dict = 0, "", {"elapsed": 1.0}

    def update(self, n: int) -> None:
        self.bar.update(n)

    def refresh(self) -> None:
        pass

    close = refresh


def complete_here(llm, prompts: list[list[int]], parameters: list[dict], bar: tqdm | None = None) -> Completions:
    """Completions by a `vllm.LLM` of this process."""
    from vllm import SamplingParams

    def progress(prompts=None, **_):  # asked for twice: around the prompts, then for the results
        return _Bar(bar=bar) if prompts is None else prompts

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**fields, detokenize=False, flat_logprobs=True) for fields in parameters],
        use_tqdm=progress if bar is not None else False,
    )
    completions = [output.outputs[0] for output in outputs]
    return [(list(c.token_ids), list(c.logprobs.logprobs)) for c in completions]  # of the drawn token alone


class EngineTraceSampler:
    """
    Traces and answers by any `complete`; what [`VLLMTraceSampler`], [`ServerTraceSampler`] and GRPO's rollouts share.

    Args:
        complete (`Callable`): completions of prompts of token ids, each with its own sampling parameters.
        model_path (`str`): the checkpoint; its tokenizer and generation config say which ids end an answer.
        vocabulary ([`AbstractVocabulary`], *optional*): the codebook; read from the checkpoint when left out. Needed
            for traces only: an engine of a model without one still answers.
        positions (`int`): longest sequence of the engine.
        cache_tokens (`int`, *optional*): how many tokens its KV cache holds; unknown when left out.
    """

    def __init__(
        self,
        complete: Complete,
        model_path: str,
        vocabulary: AbstractVocabulary | None,
        positions: int,
        cache_tokens: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.complete, self.positions, self.cache_tokens = complete, positions, cache_tokens
        tokenizer = tokenizer or load_tokenizer(model_path)
        self.stops = stop_ids(tokenizer, model_path)
        self.model_path, self.codebook, self.reserved = model_path, [], []
        if vocabulary is not None:
            self.codebook, self.reserved = vocabulary.ids(tokenizer), vocabulary.all_ids(tokenizer)
            self.begin, self.end = vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)

    def sample(
        self,
        prefixes: list[list[int]],
        m_max: int,
        m_min: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        bar: tqdm | None = None,
    ) -> list[Trace]:
        """
        One trace a prefix, z ~ pi_abs(. | prefix): arguments, result and errors as in [`HFTraceSampler.sample`].

        The draws differ from transformers' for the same seed; the distribution does not.
        """
        if not self.codebook:
            raise Refused(f"{self.model_path} is no extended checkpoint and writes no traces; run `abscot init` first")
        check_request(prefixes, m_max, m_min, temperature, self.positions)
        rows = range(len(prefixes)) if rows is None else rows
        parameters = [
            trace_parameters(self.codebook, self.end, m_max, m_min, temperature, row_seed(seed, row)) for row in rows
        ]
        completions = self._complete([[*prefix, self.begin] for prefix in prefixes], parameters, bar)
        return [to_trace(ids, logps, self.end, m_max) for ids, logps in completions]

    def answer(
        self,
        prefixes: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        bar: tqdm | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Continuation]:
        """Decoding after each prefix: arguments, result and errors as in [`HFTraceSampler.answer`]."""
        completions = self.complete_answers(prefixes, max_new_tokens, temperature, seed, rows, bar, top_p, top_k)
        return [Continuation.until(ids, self.stops) for ids, _ in completions]

    def complete_answers(
        self,
        prefixes: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        bar: tqdm | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> Completions:
        """As `answer`, but ids with EOS and their log-probabilities."""
        check_answer_request(prefixes, max_new_tokens, temperature, self.positions, top_p, top_k)
        rows = range(len(prefixes)) if rows is None else rows
        fields = {"top_p": top_p, "top_k": top_k} | without(self.reserved)
        parameters = [
            sampling_parameters(max_new_tokens, temperature, self.stops, row_seed(seed, row, 1), **fields)
            for row in rows
        ]
        return self._complete(prefixes, parameters, bar)

    def _complete(self, prompts: list[list[int]], parameters: list[dict], bar: tqdm | None) -> Completions:
        """Longest first: trouble with memory shows at once, and no long row is left for the end."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        completions = self.complete([prompts[i] for i in order], [parameters[i] for i in order], bar) if order else []
        results: Completions = [None] * len(prompts)
        for i, completion in zip(order, completions, strict=True):
            results[i] = completion
        return results


class VLLMTraceSampler(EngineTraceSampler):
    """
    Samples from a vLLM engine of its own, in this process. Never inside a running training group: it hangs.

    Scheduling is done in this process too (`VLLM_ENABLE_V1_MULTIPROCESSING=0`, unless the environment says otherwise).
    In a process of its own an engine starts on the first requests while others are still on their way, so that batches
    depend on timing, and with them the last bits of a GPU's sums and a few draws: a resumed run would differ.

    Args:
        model_path (`str`): an extended, merged checkpoint (vLLM loads no adapter with trained token rows).
        vocabulary ([`AbstractVocabulary`], *optional*): its codebook; read from the checkpoint when left out.
        engine: keyword arguments of `vllm.LLM` (`dtype`, `tensor_parallel_size`, `max_model_len`, ..).

    Raises:
        Refused: arguments that vLLM does not have, or that cannot be for this checkpoint; as [`engine_settings`].
    """

    def __init__(self, model_path: str, vocabulary: AbstractVocabulary | None = None, **engine):
        check_tensor_parallel(model_path, engine.get("tensor_parallel_size", 1))
        vocabulary, engine = vocabulary or own_vocabulary(model_path), engine_settings(engine)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM  # the import takes 15 s

        try:
            self.llm = LLM(model=model_path, **engine, logprobs_mode="processed_logprobs")
        except (TypeError, ValueError) as error:
            if isinstance(error, TypeError) and "unexpected keyword argument" not in str(error):
                raise
            raise Refused(f"vLLM refuses {model_path} with engine {engine}: {error}") from error
        config = self.llm.llm_engine.vllm_config
        cache = config.cache_config
        check_runner(config, model_path, vocabulary)
        super().__init__(
            partial(complete_here, self.llm),
            model_path,
            vocabulary,
            self.llm.model_config.max_model_len,
            cache.num_gpu_blocks * cache.block_size,
        )
