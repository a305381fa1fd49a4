"""Answers by transformers' `generate`: plain text after any prefix, and the two calls of abstract mode."""

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abscot_trl.traces.batching import batches, left_pad
from abscot_trl.traces.hf import plain_generation


@dataclass
class Continuation:
    """What a model wrote after a prefix: token ids without EOS, and whether the token limit cut it."""

    token_ids: list[int]
    truncated: bool


def continue_prefixes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 32768,
    progress: str | None = None,
) -> list[Continuation]:
    """
    Unconstrained decoding after each prefix of token ids.

    Args:
        max_new_tokens (`int`): a continuation that reaches it without EOS is marked `truncated`.
        temperature (`float`): 0 decodes greedily.
        seed (`int`): of the draws; they depend on the batch too (see `batch_tokens`).
        progress (`str`, *optional*): title of a progress bar.

    Raises:
        ValueError: a negative temperature, or a prefix that leaves no room for `max_new_tokens`.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(
            f"temperature >= 0 and max_new_tokens >= 1 are needed, got {temperature} and {max_new_tokens}"
        )
    longest = max(map(len, prefixes), default=0) + max_new_tokens
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {longest - max_new_tokens} tokens and max_new_tokens {max_new_tokens} exceed the model's "
            f"{model.config.max_position_embeddings} positions; lower max_new_tokens"
        )
    stops = model.generation_config.eos_token_id or []  # a base model may end with others than its tokenizer's
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    results: list[Continuation | None] = [None] * len(prefixes)
    lengths = [len(prefix) + max_new_tokens for prefix in prefixes]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    sampling = sampling if temperature > 0 else {"do_sample": False}
    with (
        plain_generation(model),
        torch.random.fork_rng(),
        tqdm(total=len(prefixes), desc=progress, unit="answer", disable=progress is None) as bar,
    ):
        torch.manual_seed(seed)
        for rows in batches(lengths, batch_tokens):
            ids, mask = left_pad([prefixes[row] for row in rows], pad)
            output = model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stops),
                pad_token_id=pad,
                **sampling,
            )[:, len(ids[0]) :].tolist()
            for row, tokens in zip(rows, output, strict=True):
                stop = next((i for i, token in enumerate(tokens) if token in stops), None)
                results[row] = Continuation(tokens[:stop], truncated=stop is None)
            bar.update(len(rows))
    return results
