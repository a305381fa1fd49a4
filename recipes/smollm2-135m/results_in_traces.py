"""
How much of what an answer needs stands in content traces, by single tokens and by whole words? On a CPU, in minutes.

    python recipes/smollm2-135m/tasks.py gsm-symbolic --rows 400 --test 20 --output_dir runs/smollm2-135m/few/rows
    abscot data --config recipes/smollm2-135m/data.yaml \
        --data runs/smollm2-135m/few/rows/train.jsonl --output_dir runs/smollm2-135m/few/data
    python recipes/smollm2-135m/results_in_traces.py --model runs/smollm2-135m/init --data runs/smollm2-135m/few/data

Influence is fitted on `--fit` rows and told of the others, as `abscot traces --method content` does. A step's result
is the last number of its line.
"""

import argparse
import re
from statistics import fmean

import numpy as np
from tqdm import tqdm

from abscot_trl.checkpoint import load_model, load_tokenizer
from abscot_trl.data.prepare import load_prepared
from abscot_trl.traces.content import FIT_TOKENS, candidates, chosen_at, fit_influence, influences, least_taken, tell
from abscot_trl.traces.words import token_texts

BATCH, M_MAX = 2048, 32


def results(row: dict, tokenizer) -> list[set[int]]:
    """Of each step the places in c of the tokens of its last number; steps without a number are left out."""
    texts, places, start = [tokenizer.decode([token]) for token in row["cot_ids"]], [], 0
    for end in row["step_ends"]:
        step = texts[start:end]
        edges = np.cumsum([0, *map(len, step)])  # characters
        numbers = [*re.finditer(r"\d[\d,]*(?:\.\d+)?", "".join(step))]
        if numbers:
            first, last = numbers[-1].span()
            places.append({start + k for k in range(len(step)) if edges[k] < last and edges[k + 1] > first})
        start = end + 1
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="prepared rows, by the model's tokenizer")
    parser.add_argument("--fit", type=int, default=100, help="rows whose influence is measured")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 7.0, 6.2, 5.0, 4.0])
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, "float32").eval()
    rows, rng = load_prepared(args.data, tokenizer)[0].to_list(), np.random.default_rng(0)
    fitted, others = rows[: args.fit], rows[args.fit :]
    at = [np.sort(rng.permutation(candidates(row))[:FIT_TOKENS]).tolist() for row in fitted]
    with tqdm(total=len(fitted) + sum(map(len, at)), desc="influence", unit="pass") as bar:
        lost, states = influences(model, fitted, at, BATCH, bar)
    weights, texts = fit_influence(states.numpy(), lost.numpy()), token_texts(tokenizer)
    needed = [results(row, tokenizer) for row in others]
    print("| traces of | ratio | tokens | last step's result whole | every step's |\n|---|---:|---:|---:|---:|")  # noqa: T201
    for name, joins in (("single tokens", [""] * len(texts)), ("whole words", texts)):
        told = dict(tqdm(tell(model, others, weights, joins, BATCH), total=len(others), desc=name, unit="row"))
        for ratio in args.ratios:
            least = least_taken(told, others, ratio)
            taken = [set(chosen_at(row, told[i], least, M_MAX).tolist()) for i, row in enumerate(others)]
            pairs = [(some, steps) for some, steps in zip(taken, needed, strict=True) if steps]
            last = fmean(steps[-1] <= some for some, steps in pairs)
            every = fmean(all(step <= some for step in steps) for some, steps in pairs)
            print(f"| {name} | {ratio:g} | {fmean(map(len, taken)):.1f} | {last:.1%} | {every:.1%} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
