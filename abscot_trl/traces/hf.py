"""Traces and answers by transformers' `generate`; a logits processor constrains the trace."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from abscot_trl.traces.batching import batches, left_pad
from abscot_trl.traces.constraint import (
    Continuation,
    Trace,
    check_answer_request,
    check_request,
    constrained_logps,
    stop_ids,
)
from abscot_trl.vocabulary import AbstractVocabulary


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, cache on, and none of the checkpoint's own generation settings (penalties, top-k, ..)."""
    training, config, use_cache = model.training, model.generation_config, model.config.use_cache
    model.eval()
    model.generation_config, model.config.use_cache = GenerationConfig(), True
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
        model.generation_config, model.config.use_cache = config, use_cache


class _TraceProcessor(LogitsProcessor):
    """Picks each row's next token from pi_abs, notes its log-probability and leaves it the only finite score."""

    def __init__(self, allowed: list[int], start: int, m_min: int, m_max: int, temperature: float, seeds: list):
        self.allowed, self.start, self.m_min, self.m_max = allowed, start, m_min, m_max
        self.temperature = temperature
        # Gumbel noise of the row's own seed: argmax(logp + noise) is a draw from the softmax, and a row's trace does
        # not depend on which rows stand beside it.
        self.noise = None
        if temperature > 0:
            shape = (m_max + 1, len(allowed))
            self.noise = torch.from_numpy(
                np.stack([np.random.default_rng(seed).gumbel(size=shape).astype(np.float32) for seed in seeds])
            )
        self.choices: list[torch.Tensor] = []
        self.logps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids.shape[1] - self.start
        allowed = torch.tensor(self.allowed, device=scores.device)
        logps = constrained_logps(scores[:, allowed], written, self.m_min, self.m_max, self.temperature or 1.0)
        noise = 0 if self.noise is None else self.noise[:, written].to(scores.device)
        choice = (logps + noise).argmax(dim=-1, keepdim=True)
        self.choices.append(choice[:, 0])
        self.logps.append(logps.gather(1, choice)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, allowed[choice], 0.0)


class _AnswerProcessor(LogitsProcessor):
    """
    Draws each row's next token and leaves it the only finite score: the first whose cumulated probability exceeds a
    uniform number of the row's own seed, so that a row's answer does not depend on which rows stand beside it.
    """

    def __init__(self, start: int, temperature: float, top_p: float, top_k: int, length: int, seeds: list):
        self.start = start
        self.uniform = torch.from_numpy(np.stack([np.random.default_rng(seed).random(length) for seed in seeds]))
        self.warpers = [TemperatureLogitsWarper(temperature)]
        self.warpers += [TopKLogitsWarper(top_k)] if top_k else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float()
        for warp in self.warpers:
            logits = warp(input_ids, logits)
        reached = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        uniform = self.uniform[:, input_ids.shape[1] - self.start, None].to(scores.device)
        choice = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, choice, 0.0)


class HFTraceSampler:
    """
    Samples traces and answers from a transformers model.

    Args:
        model ([`~transformers.PreTrainedModel`]): an extended checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        vocabulary ([`AbstractVocabulary`], *optional*): its codebook; a model without one still answers.
        batch_tokens (`int`, *optional*, defaults to `32768`): most tokens (prefix and trace) of one batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: AbstractVocabulary | None,
        batch_tokens: int = 32768,
    ):
        self.model, self.batch_tokens = model, batch_tokens
        self.positions, self.cache_tokens = model.config.max_position_embeddings, None
        self.stops, self.reserved = stop_ids(tokenizer, model.generation_config), []
        if vocabulary is not None:
            self.codebook, self.reserved = vocabulary.ids(tokenizer), vocabulary.all_ids(tokenizer)
            self.begin, self.end = vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

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
        One trace a prefix, z ~ pi_abs(. | prefix).

        Args:
            prefixes (`list[list[int]]`): token ids of x, or of x and c; the begin delimiter is added here.
            m_max, m_min (`int`): most and fewest codebook tokens.
            temperature (`float`): 0 decodes greedily.
            seed (`int`): with the row's number it fixes the row's draw, whatever the batch.
            rows (`Sequence[int]`, *optional*): the rows' numbers; 0, 1, .. when left out.
            bar (`tqdm`, *optional*): moved on by one a row.

        Raises:
            Refused: limits that cannot be met, or a prefix that leaves the model no room for `m_max` tokens.
        """
        check_request(prefixes, m_max, m_min, temperature, self.positions)
        rows = range(len(prefixes)) if rows is None else rows
        traces: list[Trace | None] = [None] * len(prefixes)
        lengths = [len(prefix) + m_max + 2 for prefix in prefixes]
        with plain_generation(self.model):
            for batch in batches(lengths, self.batch_tokens):
                given, seeds = [prefixes[i] for i in batch], [[seed, rows[i]] for i in batch]
                for i, trace in zip(batch, self._batch(given, seeds, m_max, m_min, temperature), strict=True):
                    traces[i] = trace
                if bar is not None:
                    bar.update(len(batch))
        return traces

    def _batch(self, prefixes, seeds, m_max, m_min, temperature) -> Iterator[Trace]:
        ids, mask = left_pad([[*prefix, self.begin] for prefix in prefixes], self.pad)
        processor = _TraceProcessor([*self.codebook, self.end], len(ids[0]), m_min, m_max, temperature, seeds)
        self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            logits_processor=[processor],
            max_new_tokens=m_max + 1,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )
        choices = torch.stack(processor.choices, dim=1).tolist()
        logps = torch.stack(processor.logps, dim=1).tolist()
        for chosen, logp in zip(choices, logps, strict=True):
            length = chosen.index(len(self.codebook))  # the end delimiter; always there, m_max forces it
            yield Trace(
                [self.codebook[index] for index in chosen[:length]],
                logp[:length],
                logp[length],
                forced_end=length == m_max,
            )

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
        """
        Decoding after each prefix of token ids, over all tokens but the reserved ones: after an empty trace a model
        that reasons in its trace would otherwise write it here, where no text shows it.

        Args:
            max_new_tokens (`int`): a continuation that reaches it without EOS is marked `truncated`.
            temperature (`float`): 0 decodes greedily.
            seed (`int`): with the row's number it fixes the row's draw, whatever the batch.
            rows (`Sequence[int]`, *optional*): the rows' numbers; 0, 1, .. when left out.
            bar (`tqdm`, *optional*): moved on by one a row.
            top_p (`float`): draw among the likeliest tokens that together reach this probability.
            top_k (`int`): draw among so many of the likeliest tokens; 0 takes all. Applied before `top_p`.

        Raises:
            Refused: a negative temperature, a truncation that keeps no token, or a prefix that leaves no room for
                `max_new_tokens`.
        """
        drawn = self.complete_answers(prefixes, max_new_tokens, temperature, seed, rows, bar, top_p, top_k)
        return [Continuation.until(ids, self.stops) for ids in drawn]

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
    ) -> list[list[int]]:
        """As `answer`, but ids with EOS, for a trainer."""
        check_answer_request(prefixes, max_new_tokens, temperature, self.positions, top_p, top_k)
        rows = range(len(prefixes)) if rows is None else rows
        results: list[list[int]] = [[]] * len(prefixes)
        lengths = [len(prefix) + max_new_tokens for prefix in prefixes]
        with plain_generation(self.model):
            for batch in batches(lengths, self.batch_tokens):
                ids, mask = left_pad([prefixes[i] for i in batch], self.pad)
                seeds = [[seed, rows[i], 1] for i in batch]  # 1: not the trace's draws again
                draws = (len(ids[0]), temperature, top_p, top_k, max_new_tokens, seeds)
                output = self.model.generate(
                    torch.tensor(ids, device=self.model.device),
                    attention_mask=torch.tensor(mask, device=self.model.device),
                    logits_processor=[_AnswerProcessor(*draws)] if temperature > 0 else [],
                    suppress_tokens=self.reserved or None,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.stops,
                    pad_token_id=self.pad,
                )[:, len(ids[0]) :].tolist()
                for i, tokens in zip(batch, output, strict=True):
                    stop = next((n for n, token in enumerate(tokens, 1) if token in self.stops), None)
                    results[i] = tokens[:stop]
                if bar is not None:
                    bar.update(len(batch))
        return results
