"""
First traces from what later text reads: of a CoT the few tokens whose loss would cost later steps and the answer most,
each as a code.

*Influence* of a token: by how many nats the steps after its own, and the answer, get less likely when the model's
likeliest other token stands in its place. It is measured for some tokens of some rows, a forward pass each; a ridge
regression on the model's last hidden states tells it for all others, a row a forward pass. The `ratio`-th part of all
CoTs' tokens that has the most influence makes the traces, in their order: a CoT that finds more has a longer one. In
chain arithmetic these turn out to be the results of the steps (tests/test_content.py).

*Words* are taken whole, by their most influential token: of 501, three tokens, the last one alone would leave the
others to be read from the problem, and an answer that reads its problem does not follow its trace.

*Codes*: the M token types that occur most often among them stand for themselves, every other type for the one of these
whose embedding is nearest. `abscot init --codes` lets a code's embedding begin as that of its token.

Steps are the CoT's lines; their last tokens, which hold the line break, are never taken.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_model
from abscot_trl.errors import Refused
from abscot_trl.storage import Parts, look_again, phase_settings, write_whole
from abscot_trl.traces.batching import batches, cut
from abscot_trl.traces.words import token_texts, words
from abscot_trl.vocabulary import AbstractVocabulary

CONTENT_FILE, PART = "content.safetensors", "influence-{:06}.safetensors"
FIT_ROWS, FIT_TOKENS = 1024, 8  # rows whose influence is measured, and of each so many tokens
SAVED_ROWS = 16  # that are measured between two savings: on a CPU all of them may take hours
CPU_TOKENS = 2048  # of a batch on a CPU at most: larger ones are no faster there, and a bar would stand still
COLUMNS = ("prompt_ids", "cot_ids", "answer_ids", "step_ends")


def read_tensor(path: Path, name: str) -> Tensor:
    """
    Raises:
        Refused: the file is damaged.
    """
    try:
        return load_file(path)[name]
    except (SafetensorError, KeyError) as error:
        raise Refused(f"{path} is damaged ({error}); remove it and run the same command again") from error


def padded_states(model: PreTrainedModel, rows: list[list[int]], pad: int = 0) -> Tensor:
    """
    Last hidden states (B, L, d) of rows of token ids, padded on the right: a causal model's tokens never see what
    comes after them, so no mask is needed, and attention takes its faster kernel.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    return model.base_model(input_ids=ids).last_hidden_state


def steps_at(row: dict) -> tuple[list[int], np.ndarray]:
    """Token ids of [x; c; y], and of each its step: -1 in x, 0.. in c, the number of steps in y."""
    ids = [*row["prompt_ids"], *row["cot_ids"], *row["answer_ids"]]
    within = np.searchsorted(row["step_ends"], np.arange(len(row["cot_ids"])))
    steps = [np.full(len(row["prompt_ids"]), -1), within, np.full(len(row["answer_ids"]), len(row["step_ends"]))]
    return ids, np.concatenate(steps)


def candidates(row: dict) -> np.ndarray:
    """Indices in [x; c; y] of the tokens that a trace may take: those of c without the line breaks."""
    inner = np.ones(len(row["cot_ids"]), bool)
    inner[row["step_ends"]] = False
    return len(row["prompt_ids"]) + np.flatnonzero(inner)


def rows_of(part: Dataset, span: range) -> list[dict]:
    """Those rows, read at once: one at a time takes longer than all else that is done with them on the CPU."""
    columns = part[span.start : span.stop]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _log_probs(model: PreTrainedModel, hidden: Tensor, row: list[int], first: int) -> Tensor:
    """log p of the tokens of `row` from `first` on, given its last hidden states (L, d)."""
    logits = model.get_output_embeddings()(hidden[first - 1 : len(row) - 1]).float()
    return logits.log_softmax(-1).gather(1, torch.tensor(row[first:], device=logits.device)[:, None])[:, 0]


@torch.inference_mode()
def influences(
    model: PreTrainedModel, rows: list[dict], at: list[list[int]], batch_tokens: int, bar: tqdm
) -> tuple[Tensor, Tensor]:
    """
    Of the tokens at the indices `at[i]` of [x; c; y] of row i, row after row: their influence in nats (N,), and the
    model's last hidden states there (N, d). `bar` is moved on by one a forward pass, of a row or with a token changed.
    """
    given, before, changed = [steps_at(row) for row in rows], {}, []
    lost, states = {}, {}
    for batch in batches([len(ids) for ids, _ in given], batch_tokens):
        for i, hidden in zip(batch, padded_states(model, [given[i][0] for i in batch]), strict=True):
            ids = given[i][0]
            before[i], states[i] = _log_probs(model, hidden, ids, 1), hidden[at[i]].float().cpu()
            likeliest = model.get_output_embeddings()(hidden[[k - 1 for k in at[i]]]).topk(2).indices.tolist()
            for k, (first, second) in zip(at[i], likeliest, strict=True):
                changed.append((i, k, ids[:k] + [second if first == ids[k] else first] + ids[k + 1 :]))
        bar.update(len(batch))
    for batch in batches([len(ids) for *_, ids in changed], batch_tokens):
        for (i, k, _), hidden in zip(
            [changed[n] for n in batch], padded_states(model, [changed[n][2] for n in batch]), strict=True
        ):
            ids, steps = given[i]
            later = int(np.searchsorted(steps, steps[k], side="right"))  # where the next step begins
            lost[i, k] = (before[i][later - 1 :] - _log_probs(model, hidden, ids, later)).sum()
        bar.update(len(batch))
    order = [(i, k) for i, some in enumerate(at) for k in some]
    return torch.stack([lost[one] for one in order]).cpu(), torch.cat([states[i] for i in range(len(rows))])


def hidden_states(model: PreTrainedModel, rows: list[dict], batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
    """The last hidden states of [x; c; y] by batches, longest rows first: (rows, (B, L, d)) on the model's device."""
    ids = [steps_at(row)[0] for row in rows]
    with torch.inference_mode():
        for batch in batches([len(row) for row in ids], batch_tokens):
            yield batch, padded_states(model, [ids[i] for i in batch])


def of_words(told: np.ndarray, row: dict, texts: list[str]) -> np.ndarray:
    """Of each of a row's candidates the largest value of its word's: (candidates,), from those of [x; c; y]."""
    at = candidates(row)
    word = words(row["cot_ids"], texts)[at - len(row["prompt_ids"])]
    largest = np.full(len(row["cot_ids"]), -np.inf, told.dtype)
    np.maximum.at(largest, word, told[at])
    return largest[word]


def tell(
    model: PreTrainedModel, rows: list[dict], weights: Tensor, texts: list[str], batch_tokens: int
) -> Iterator[tuple[int, np.ndarray]]:
    """
    What `weights` (d + 1, the last one the intercept) tell of the influence of the words of each row's candidates,
    longest rows first: (row, (candidates,)). A product a batch, on the model's device: a row at a time took 13 rows/s
    on H200.
    """
    for batch, hidden in hidden_states(model, rows, batch_tokens):
        there = weights.to(hidden.device)
        for i, told in zip(batch, (hidden.float() @ there[:-1] + there[-1]).cpu().numpy(), strict=True):
            yield i, of_words(told, rows[i], texts)


def least_taken(told: dict[int, np.ndarray], rows: list[dict], ratio: float) -> Tensor:
    """What a word's influence must be for the `ratio`-th part of all CoTs' tokens to be taken."""
    best = np.sort(np.concatenate([*told.values()]))[::-1]
    count = round(sum(len(row["cot_ids"]) for row in rows) / ratio)
    return torch.tensor(best[min(max(count, 1), len(best)) - 1])


def chosen_at(row: dict, told: np.ndarray, least: Tensor, m_max: int) -> np.ndarray:
    """
    Which tokens of a row's c make its trace, in their order: the candidates whose influence is told to be `least` or
    more; the most influential word's at least, and `m_max` at most, of whole words; of a longer word as many.
    """
    within = candidates(row) - len(row["prompt_ids"])
    least = min(least.item(), told.max())
    best = np.argsort(-told, kind="stable")[: (told >= least).sum()]
    if len(best) > m_max:
        whole = best[told[best] > told[best[m_max]]]  # without the word that m_max would cut
        best = whole if len(whole) else best[:m_max]
    return np.sort(within[best])


def chosen(row: dict, told: np.ndarray, least: Tensor, m_max: int) -> list[int]:
    """The ids of those tokens."""
    return [row["cot_ids"][k] for k in chosen_at(row, told, least, m_max)]


def fit_influence(states: np.ndarray, lost: np.ndarray) -> Tensor:
    """Weights (d + 1) that tell log(1 + influence) from hidden states (N, d)."""
    from sklearn.linear_model import RidgeCV  # seconds to import

    mean, spread = states.mean(0), states.std(0) + 1e-6
    ridge = RidgeCV(np.logspace(0, 5, 11)).fit((states - mean) / spread, np.log1p(np.maximum(lost, 0)))
    weights = ridge.coef_ / spread
    return torch.tensor([*weights, ridge.intercept_ - mean @ weights], dtype=torch.float32)


def fit_codes(taken: list[list[int]], embeddings: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """
    The token that each code stands for (M,), -1 where there were fewer kinds; and each token's code (V,).

    Args:
        taken (`list[list[int]]`): the traces' tokens.
        embeddings (`Tensor`): the model's input embeddings (V, d).
    """
    common = [token for token, _ in sorted(Counter(t for row in taken for t in row).items(), key=lambda p: (-p[1], p))]
    tokens = torch.tensor(common[:size])
    rows = torch.nn.functional.normalize(embeddings.float().cpu(), dim=1)
    codes = (rows @ rows[tokens].T).argmax(1)
    codes[tokens] = torch.arange(len(tokens))
    return torch.nn.functional.pad(tokens, (0, size - len(tokens)), value=-1), codes


def _measured(model: PreTrainedModel, args, rows: list[dict], at: list[list[int]], folder: Path) -> list[Tensor]:
    """As `influences`, of `SAVED_ROWS` at a time, which a kill leaves in `folder`."""
    files = []
    with tqdm(total=len(rows) + sum(map(len, at)), desc="influence", unit="pass") as bar:
        for start in range(0, len(rows), SAVED_ROWS):
            some, there = (every[start : start + SAVED_ROWS] for every in (rows, at))
            files.append(folder / PART.format(start))
            if files[-1].is_file():
                bar.update(len(some) + sum(map(len, there)))
                continue
            lost, states = influences(model, some, there, args.batch_tokens, bar)
            write_whole(files[-1], save({"lost": lost, "states": states}))
    return [torch.cat([read_tensor(file, name) for file in files]) for name in ("lost", "states")]


def _fit(
    model: PreTrainedModel, args, vocabulary: AbstractVocabulary, texts: list[str], part: Dataset, folder: Path
) -> dict[str, Tensor]:
    """
    What makes the traces: `weights` of influence, the `least_word` that is taken, `tokens` of the codes and `codes` of
    the tokens.
    """
    rng = np.random.default_rng(args.seed)
    rows = [row for row in part.select(sorted(rng.permutation(len(part))[:FIT_ROWS])) if len(candidates(row))]
    if not rows:
        raise Refused(f"{args.data}: no CoT holds a token that a trace could take; use rows with longer steps")
    at = [np.sort(rng.permutation(candidates(row))[:FIT_TOKENS]).tolist() for row in rows]
    lost, states = _measured(model, args, rows, at, folder)
    weights = fit_influence(states.numpy(), lost.numpy())
    told = tell(model, rows, weights, texts, args.batch_tokens)
    told = dict(tqdm(told, total=len(rows), desc="threshold", unit="row"))
    least = least_taken(told, rows, args.ratio)
    taken = [chosen(row, told[i], least, vocabulary.m_max) for i, row in enumerate(rows)]
    tokens, codes = fit_codes(taken, model.get_input_embeddings().weight.detach(), vocabulary.size)
    return {"weights": weights, "least_word": least, "tokens": tokens, "codes": codes}


def _codes_of(traces: str, model: str, vocabulary: AbstractVocabulary) -> bytes:
    """
    What made other content traces, for this model's.

    Raises:
        Refused: no content traces, or those of an earlier version; of another codebook, model or tokenizer.
    """
    file, config = Path(traces) / CONTENT_FILE, AutoConfig.from_pretrained(model).get_text_config()
    there = [len(tokens_of_codes(traces)), len(read_tensor(file, "weights")) - 1, len(read_tensor(file, "codes"))]
    if "least_word" not in load_file(file):
        raise Refused(
            f"{traces} was made by an earlier version, of single tokens: end its run with that version, or begin one "
            "in another run_dir"
        )
    if there != (here := [vocabulary.size, config.hidden_size, config.vocab_size]):
        raise Refused(
            f"{traces} was made with {there[0]} codes by a model of width {there[1]} and {there[2]} tokens, {model} "
            f"has {here[0]}, {here[1]} and {here[2]}: make its traces anew, without codes"
        )
    return file.read_bytes()


def content_parts(
    args,
    vocabulary: AbstractVocabulary,
    tokenizer: PreTrainedTokenizerBase,
    part: Dataset,
    rows: list[int],
    share: int,
    shares: int,
) -> tuple[Parts, int, int]:
    """
    Make this share of the parts. The first share that comes fits influence and codes, or takes those of `args.codes`;
    the others wait for it.

    Args:
        args ([`TracesArguments`]): its settings.
        part ([`~datasets.Dataset`]): prepared rows; `rows` are their numbers in the data.
        share (`int`): which of `shares`, from 1.

    Returns:
        The parts, how many they are in the end, and how many were made here.

    Raises:
        Refused: no CoT of more than line breaks; codes of another codebook or model; a damaged part.
    """
    if not torch.cuda.is_available():
        args = replace(args, batch_tokens=min(args.batch_tokens, CPU_TOKENS))
    fit = args.codes and _codes_of(args.codes, args.model, vocabulary)
    part = part.select_columns(["id", *COLUMNS])
    some = part.select_columns([*COLUMNS[:3]]).iter(batch_size=1000)
    lengths = [sum(map(len, row)) for batch in some for row in zip(*batch.values(), strict=True)]
    parts = Parts(args.output_dir, phase_settings(args, rows=len(rows), takes="words"))
    spans, ids = cut(lengths, args.part_tokens), part["id"][:]
    load = cache(lambda: load_model(args.model, args.dtype, device_map="auto").eval())
    fitted = parts.folder / CONTENT_FILE
    todo = [n for n in range(share - 1, len(spans), shares) if not parts.done(n)]
    if not todo:
        return parts, len(spans), 0
    texts = token_texts(tokenizer)
    with parts.joining():
        look_again(fitted)
        if not fitted.is_file():
            write_whole(fitted, fit or save(_fit(load(), args, vocabulary, texts, part, parts.folder)))
    weights, least, codes = (read_tensor(fitted, name) for name in ("weights", "least_word", "codes"))
    total = sum(len(spans[n]) for n in todo)
    with tqdm(total=total, unit="row", desc=f"traces {args.shard or ''}".strip(), position=share - 1) as bar:
        for n in todo:
            these, traces = rows_of(part, spans[n]), {}
            for i, told in tell(load(), these, weights, texts, args.batch_tokens):
                if len(told):
                    traces[i] = codes[chosen(these[i], told, least, vocabulary.m_max)].tolist()
                bar.update()
            records = [
                {"row": rows[i], "id": ids[i], "trace": traces[k]} for k, i in enumerate(spans[n]) if k in traces
            ]
            parts.write(n, records)
    return parts, len(spans), len(todo)


def tokens_of_codes(traces: str | Path) -> list[int]:
    """
    The token id that each code of content traces stands for, -1 for none.

    Raises:
        Refused: `traces` are no content traces.
    """
    file = Path(traces) / CONTENT_FILE
    if not file.is_file():
        raise Refused(f"{traces} holds no {CONTENT_FILE}: it is no folder of `abscot traces --method content`")
    return read_tensor(file, "tokens").tolist()
