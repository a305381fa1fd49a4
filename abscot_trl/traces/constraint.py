"""
Constrained decoding of a trace (section 3.3): which tokens are allowed, and the policy renormalised over them.

    pi_abs(z_i | ., z_<i) = pi(z_i) / sum_{a in A_i} pi(a),    A_i = V_abs u {<endabstract>}

with <endabstract> out of A_i before m_min codebook tokens, and alone in it after m_max (so its log-probability is 0).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from abscot_trl.errors import Refused


@dataclass
class Trace:
    """
    One sampled trace.

    Args:
        token_ids (`list[int]`): codebook token ids, delimiters left out; may be empty when m_min is 0.
        logps (`list[float]`): log pi_abs of each of them, at the sampling temperature (at 1 for greedy decoding).
        end_logp (`float`): log pi_abs of `<endabstract>`; 0 when it was forced.
        forced_end (`bool`): whether m_max ended the trace.
    """

    token_ids: list[int]
    logps: list[float] = field(default_factory=list)
    end_logp: float = 0.0
    forced_end: bool = False


@dataclass
class Continuation:
    """What a model wrote after a prefix: token ids without EOS, and whether the token limit cut it."""

    token_ids: list[int]
    truncated: bool

    @classmethod
    def until(cls, token_ids: list[int], stops: list[int]) -> "Continuation":
        """`token_ids` up to the first of `stops`."""
        stop = next((i for i, token in enumerate(token_ids) if token in stops), None)
        return cls(token_ids[:stop], truncated=stop is None)


def stop_ids(tokenizer: PreTrainedTokenizerBase, model: str | GenerationConfig) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS and the checkpoint's, which may be others on a base model."""
    if isinstance(model, str):
        try:
            model = GenerationConfig.from_pretrained(model)
        except OSError as error:
            if (Path(model) / "generation_config.json").is_file():
                raise Refused(f"{model}: its generation_config.json cannot be read ({error})") from error
            model = GenerationConfig()  # a checkpoint need not have one
    others = model.eos_token_id or []
    return sorted({tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])} - {None})


def check_answer_request(
    prefixes: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    positions: int,
    top_p: float = 1.0,
    top_k: int = 0,
) -> None:
    """
    What every sampler refuses of an answer.

    Raises:
        Refused: a negative temperature, a truncation that keeps no token, or a prefix that leaves no room for
            `max_new_tokens`.
    """
    if not 0 < top_p <= 1 or top_k < 0:
        raise Refused(f"0 < top_p <= 1 and top_k >= 0 (0: all tokens) are needed, got {top_p} and {top_k}")
    if temperature < 0 or max_new_tokens < 1:
        raise Refused(f"temperature >= 0 and max_new_tokens >= 1 are needed, got {temperature} and {max_new_tokens}")
    longest = max(map(len, prefixes), default=0)
    if longest + max_new_tokens > positions:
        raise Refused(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's {positions} "
            "positions; lower max_new_tokens"
        )


def check_request(prefixes: list[list[int]], m_max: int, m_min: int, temperature: float, positions: int) -> None:
    """
    What every sampler refuses; `positions` is the model's (or the engine's) longest sequence.

    Raises:
        Refused: limits that no trace can meet, a negative temperature, or a prefix without room for `m_max` tokens
            and both delimiters.
    """
    if temperature < 0:
        raise Refused(f"temperature must not be negative, got {temperature}; 0 decodes greedily")
    if m_max < 1 or not 0 <= m_min <= m_max:
        raise Refused(f"trace lengths need 0 <= m_min <= m_max and m_max >= 1, got m_min={m_min}, m_max={m_max}")
    longest = max(map(len, prefixes), default=0)
    if longest > positions - m_max - 2:
        raise Refused(
            f"a prefix of {longest} tokens leaves no room for a trace of {m_max} in {positions} positions; "
            "drop the row (max_total_tokens of the data phase)"
        )


def constrained_logps(
    logits: Tensor, written: int | Tensor, m_min: int, m_max: int, temperature: float = 1.0
) -> Tensor:
    """
    log pi_abs for the next position, from logits over (V_abs, <endabstract>) in that order.

    Args:
        logits (`Tensor`): shape (.., M + 1), the end delimiter last.
        written (`int` or `Tensor`): codebook tokens before this position, of shape (..) where positions differ.

    Returns:
        `Tensor` of shape (.., M + 1) in float32; -inf where not allowed.
    """
    logits = logits.float() / temperature
    written = torch.as_tensor(written, device=logits.device).expand(logits.shape[:-1])[..., None]
    end = torch.arange(logits.shape[-1], device=logits.device) == logits.shape[-1] - 1
    forbidden = torch.where(end, written < m_min, written >= m_max)
    return torch.log_softmax(logits.masked_fill(forbidden, -torch.inf), dim=-1)
