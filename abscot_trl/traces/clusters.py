"""
First traces from what the base model thinks (section 3.2): a step's token is the k-means cluster of the model's last
hidden state at the step's end. Consecutive steps are grouped so that a trace fits m_max; the last state of a group
stands for it.

Each row passes the model once. The clusters are fitted on the states of at most `FIT_ROWS` rows, drawn by the seed.
While they are made these states lie on disk, FIT_ROWS x m_max x d values in the model's dtype: at most 4096 x 128 x
2560 x 2 bytes = 2.7 GB for Qwen3-4B in bf16, and three times that in the memory of the one process that fits them (as
they are, and in float32). The states of all other rows are assigned as they pass and never kept.

A batch holds rows of one part, so a row's states do not depend on how many processes share the parts.
"""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_model
from abscot_trl.errors import Refused
from abscot_trl.storage import Parts, look_again, phase_settings, write_whole
from abscot_trl.traces.batching import batches, cut
from abscot_trl.vocabulary import AbstractVocabulary

CLUSTER_FILE = "clusters.safetensors"
FIT_ROWS = 4096


def group_ends(n_steps: int, m_max: int) -> list[int]:
    """Last step of each of at most `m_max` groups of consecutive steps, sizes equal to within one."""
    groups = min(n_steps, m_max)
    return [math.ceil((g + 1) * n_steps / groups) - 1 for g in range(groups)]


def fit_sample(lengths: list[int], seed: int) -> list[int]:
    """The rows that clusters are fitted on, longest first."""
    chosen = np.random.default_rng(seed).permutation(len(lengths))[:FIT_ROWS].tolist()
    return sorted(chosen, key=lambda row: -lengths[row])


def padded_states(model: PreTrainedModel, rows: list[list[int]], pad: int = 0) -> torch.Tensor:
    """Last hidden states (B, L, d) of rows of token ids, padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    mask = torch.arange(longest, device=model.device) < torch.tensor([[len(row)] for row in rows], device=model.device)
    return model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def step_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list], m_max: int, batch_tokens: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """
    The last hidden states at the ends of each row's groups of steps, longest rows first: (row, (groups, d)).

    Args:
        rows (`dict[str, list]`): columns `prompt_ids`, `cot_ids` and `step_ends`.
    """
    pad = tokenizer.pad_token_id or 0
    ids = [x + c for x, c in zip(rows["prompt_ids"], rows["cot_ids"], strict=True)]
    with torch.inference_mode():
        for batch in batches([len(row) for row in ids], batch_tokens):
            for hidden, i in zip(padded_states(model, [ids[i] for i in batch], pad), batch, strict=True):
                ends = rows["step_ends"][i]
                at = [len(rows["prompt_ids"][i]) + ends[step] for step in group_ends(len(ends), m_max)]
                yield i, hidden[at].cpu()


def fit_clusters(states: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Centroids (`size`, d) of the states (N, d)."""
    from sklearn.cluster import MiniBatchKMeans  # seconds to import

    kmeans = MiniBatchKMeans(size, random_state=seed, n_init=10, batch_size=4096, max_iter=300).fit(states)
    return kmeans.cluster_centers_


def nearest(states: torch.Tensor, centroids: np.ndarray) -> list[int]:
    """The nearest of the centroids (M, d) to each of the states (N, d)."""
    states, centroids = states.double().numpy(), centroids.astype(float)
    return ((centroids**2).sum(axis=1) - 2 * states @ centroids.T).argmin(axis=1).tolist()


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """
    Raises:
        Refused: the file is damaged.
    """
    try:
        return load_file(path)[name]
    except (SafetensorError, KeyError) as error:
        raise Refused(f"{path} is damaged ({error}); remove it and run the same command again") from error


def cluster_parts(
    args,
    vocabulary: AbstractVocabulary,
    tokenizer: PreTrainedTokenizerBase,
    part: Dataset,
    rows: list[int],
    share: int,
    shares: int,
) -> tuple[Parts, int, int]:
    """
    Make this share of the parts: of the states of the sample, and of the traces of all other rows once clusters are
    fitted, which whoever ends last with the states does. Part 0 has the traces of the sample.

    One of several shares that has made states stops there: if it went on, the others would have to wait for it. Given
    again it makes its traces.

    Args:
        args ([`TracesArguments`]): its settings.
        part ([`~datasets.Dataset`]): prepared rows; `rows` are their numbers in the data.
        share (`int`): which of `shares`, from 1.

    Returns:
        The parts, how many they are in the end, and how many were made here, of states or of traces.

    Raises:
        Refused: fewer step states than clusters, before anything is written; a damaged part.
    """
    part = part.select_columns(["id", "prompt_ids", "cot_ids", "step_ends"])
    lengths = [
        len(x) + len(c)
        for batch in part.iter(1000)  # not the whole of it in memory
        for x, c in zip(batch["prompt_ids"], batch["cot_ids"], strict=True)
    ]

    def cut_rows(chosen: list[int]) -> list[list[int]]:
        return [chosen[span.start : span.stop] for span in cut([lengths[i] for i in chosen], args.part_tokens)]

    sample = fit_sample(lengths, args.seed)
    groups = [min(len(ends), vocabulary.m_max) for ends in part.select(sample)["step_ends"]]
    if sum(groups) < vocabulary.size:
        raise Refused(
            f"{sum(groups)} CoT steps in {len(sample)} rows cannot form {vocabulary.size} clusters; give more rows or "
            "a smaller codebook"
        )
    settings = phase_settings(args, rows=len(rows))
    parts, states = Parts(args.output_dir, settings), Parts(args.output_dir, settings, "states{:06}.safetensors")
    drawn, others = cut_rows(sample), cut_rows(sorted({*range(len(rows))} - {*sample}))
    load = cache(lambda: load_model(args.model, args.dtype, device_map="auto"))

    def work(what: str, chosen: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        found = step_states(load(), tokenizer, part[chosen], vocabulary.m_max, args.batch_tokens)
        title = f"{what} {args.shard or ''}".strip()
        yield from tqdm(found, title, len(chosen), unit="row", position=share - 1)

    def record(i: int, trace: list[int]) -> dict:
        return {"row": rows[i], "id": ids[i], "trace": trace}

    ids = part["id"][:]
    mine = [n for n in range(share - 1, len(drawn), shares) if not (parts.done(0) or states.done(n))]
    for n in mine:
        write_whole(states.path(n), save({"states": torch.cat([found for _, found in work("step states", drawn[n])])}))
    clusters = parts.folder / CLUSTER_FILE
    with parts.joining():
        look_again(parts.path(0))
        if not parts.done(0) and all(states.done(n) for n in range(len(drawn))):
            found = torch.cat([read_tensor(states.path(n), "states") for n in range(len(drawn))])
            centroids = fit_clusters(found.float().numpy(), vocabulary.size, args.seed)
            write_whole(clusters, save({"centroids": torch.tensor(centroids)}))
            traces = zip(sample, found.split(groups), strict=True)
            parts.write(0, [record(i, nearest(at_ends, centroids)) for i, at_ends in traces])
    todo = [n for n in range(share, len(others) + 1, shares) if not parts.done(n)]
    if not parts.done(0) or (mine and shares > 1):
        return parts, len(others) + 1, len(mine)
    centroids = read_tensor(clusters, "centroids").numpy()
    for n in todo:
        traces = {i: nearest(at_ends, centroids) for i, at_ends in work("traces", others[n - 1])}
        parts.write(n, [record(row, traces[i]) for i, row in enumerate(others[n - 1])])
    return parts, len(others) + 1, len(mine) + len(todo)
