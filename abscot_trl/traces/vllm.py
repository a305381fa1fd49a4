"""
On-policy traces by vLLM: built-in sampling parameters only, token ids in and out.

The constraint is `allowed_token_ids`, the minimum is `min_tokens` (which keeps the end delimiter out until then), the
end is forced by `max_tokens`. With `logprobs_mode="processed_logprobs"` vLLM's log-probabilities are those of the
renormalised policy at the sampling temperature.
"""

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from abscot_trl.traces.constraint import Trace, check_request
from abscot_trl.vocabulary import AbstractVocabulary


def check_tensor_parallel(model_path: str, size: int) -> None:
    """
    Raises:
        ValueError: `size` does not divide the attention heads; the message names the sizes that do.
    """
    heads = AutoConfig.from_pretrained(model_path).num_attention_heads
    if heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"tensor_parallel_size {size} does not divide the {heads} heads of {model_path}; use one of {fitting}"
        )


class VLLMTraceSampler:
    """
    Samples traces from a vLLM engine of its own, in this process. Never inside a running training group: it hangs.

    Args:
        model_path (`str`): an extended, merged checkpoint (vLLM loads no adapter with trained token rows).
        vocabulary ([`AbstractVocabulary`], *optional*): its codebook; read from the checkpoint when left out.
        engine: keyword arguments of `vllm.LLM` (`dtype`, `tensor_parallel_size`, `max_model_len`, ..).
    """

    def __init__(self, model_path: str, vocabulary: AbstractVocabulary | None = None, **engine):
        check_tensor_parallel(model_path, engine.get("tensor_parallel_size", 1))
        vocabulary = vocabulary or AbstractVocabulary.load(model_path)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.codebook = vocabulary.ids(tokenizer)
        self.begin, self.end = vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)
        from vllm import LLM  # the import takes 15 s

        self.llm = LLM(model=model_path, enable_prefix_caching=True, logprobs_mode="processed_logprobs", **engine)

    def sample(
        self,
        prefixes: list[list[int]],
        m_max: int,
        m_min: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        progress: bool = False,
    ) -> list[Trace]:
        """
        One trace a prefix, z ~ pi_abs(. | prefix): arguments, result and errors as in [`HFTraceSampler.sample`].

        The draws differ from transformers' for the same seed; the distribution does not.
        """
        from vllm import SamplingParams

        check_request(prefixes, m_max, m_min, temperature, self.llm.model_config.max_model_len)
        if not prefixes:
            return []
        parameters = [
            SamplingParams(
                temperature=temperature,
                seed=int(np.random.SeedSequence([seed, row]).generate_state(1)[0]),
                allowed_token_ids=[*self.codebook, self.end],
                stop_token_ids=[self.end],
                min_tokens=m_min,
                max_tokens=m_max,
                logprobs=0,
                detokenize=False,
            )
            for row in range(len(prefixes))
        ]
        prompts = [{"prompt_token_ids": [*prefix, self.begin]} for prefix in prefixes]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=progress)
        return [self._trace(output.outputs[0], m_max) for output in outputs]

    def _trace(self, completion, m_max: int) -> Trace:
        ids = list(completion.token_ids)
        logps = [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        ended = bool(ids) and ids[-1] == self.end
        if not ended and len(ids) != m_max:
            raise RuntimeError(f"vLLM stopped after {len(ids)} of {m_max} tokens for {completion.finish_reason!r}")
        if ended:
            return Trace(ids[:-1], logps[:-1], logps[-1], forced_end=False)
        return Trace(ids, logps, 0.0, forced_end=True)
