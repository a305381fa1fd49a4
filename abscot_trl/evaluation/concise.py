"""
`abscot concise`: the base model's own shortest right chains of thought, as rows to train on.

Best-of-k self-training for concise reasoning (compare arXiv:2502.20122, which adds few-shot prompts): k responses a
problem by a prompt that asks for brevity; of those that are right the shortest one is kept.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.prepare import COUNTS_FILE, load_prepared
from abscot_trl.data.problems import last_boxed
from abscot_trl.data.splits import part_rows
from abscot_trl.errors import Refused
from abscot_trl.evaluation.answering import verbal_reasoning_tokens
from abscot_trl.evaluation.grading import is_correct
from abscot_trl.examples import prompt_ids
from abscot_trl.storage import Parts, at_work, phase_settings, written_whole
from abscot_trl.traces.backends import SamplerArguments, load_sampler
from abscot_trl.traces.batching import cut
from abscot_trl.traces.constraint import Continuation
from abscot_trl.vocabulary import AbstractVocabulary

ROWS_FILE = "rows.jsonl"


@dataclass
class ConciseArguments(SamplerArguments):
    """
    Sample, grade and keep the base model's shortest right responses.

    Args:
        model (`str`): the extended checkpoint of the base model (`abscot init`), which the data was prepared with.
        data (`str`): prepared data (`abscot data`); a row's gold, or else its answer's box, is what is right.
        output_dir (`str`): where `rows.jsonl` (for `abscot data --data_format problems`) and `counts.json` go. While
            it is at work its finished parts are kept in `<output_dir>.parts`; the same command goes on from them.
        splits (`str`, *optional*): staged splits; the rows of all their parts, or else all rows.
        samples (`int`): k, responses a problem.
        instruction (`str`): what is added to the last user message; may be empty.
    """

    model: str = field(metadata={"help": "Extended checkpoint of the base model."})
    data: str = field(metadata={"help": "Prepared data (abscot data)."})
    output_dir: str = field(metadata={"help": "Where rows.jsonl and counts.json go."})
    splits: str | None = field(default=None, metadata={"help": "Staged splits; the rows of all their parts."})
    samples: int = field(default=8, metadata={"help": "Responses a problem."})
    instruction: str = field(
        default="Be concise: reason in as few words as you can, then put your final answer within \\boxed{}.",
        metadata={"help": "Added to the last user message."},
    )
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest response; a longer one is never kept."})
    temperature: float = field(default=0.7, metadata={"help": "Temperature of the responses."})
    seed: int = field(default=0, metadata={"help": "Seed of the responses."})
    part_tokens: int = field(default=4_000_000, metadata={"help": "Tokens between two savings of the work done."})

    def __post_init__(self):
        super().__post_init__()
        if (self.engine or {}).get("data_parallel_size", 1) > 1:
            raise Refused("engine: data_parallel_size is for `abscot traces`; use backend: server")
        for name in ("samples", "max_new_tokens", "part_tokens"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise Refused(f"temperature must be finite and not negative, got {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise Refused(f"{self.samples} samples at temperature {self.temperature} would all be the same one")


def shortest_right(
    outputs: list[Continuation], gold: str, tokenizer: PreTrainedTokenizerBase, grade=is_correct
) -> dict | str:
    """
    The shortest of `outputs` that is whole, right and reasons before its answer.

    Returns:
        `dict` with `cot`, `answer` (text) and `tokens`; or, in a word, why there is none: `all_truncated`,
        `none_right`, or `no_reasoning` (right ones were there, but with nothing before the line of their answer).
    """
    whole = sorted((output for output in outputs if not output.truncated), key=lambda output: len(output.token_ids))
    reason = "none_right" if whole else "all_truncated"
    for output in whole:
        if not grade(tokenizer.decode(output.token_ids, skip_special_tokens=True), gold):
            continue
        reasoning = verbal_reasoning_tokens(output.token_ids, tokenizer)
        parts = output.token_ids[:reasoning], output.token_ids[reasoning:]
        cot, answer = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts)
        if cot and answer:
            return {"cot": cot, "answer": answer, "tokens": len(output.token_ids)}
        reason = "no_reasoning"
    return reason


def _problem(row: dict, instruction: str) -> tuple[list[dict[str, str]], str, str] | str:
    """A prepared row's instructed messages, its prompt's text and gold; or why it is no problem."""
    messages, gold = json.loads(row["prompt"]), row["gold"] or last_boxed(row["answer"])
    if not gold or not gold.strip():
        return "no_gold"
    if [message["role"] for message in messages] != ["user"]:
        return "not_one_user_message"
    text = messages[0]["content"]
    return [{"role": "user", "content": f"{text}\n\n{instruction}" if instruction else text}], text, gold


def _records(
    args: ConciseArguments, part: Dataset, span: range, sampler, tokenizer: PreTrainedTokenizerBase, grade, bar: tqdm
) -> list[dict]:
    """Of each row of `span` its shortest right response, or why it has none, in order."""
    problems, k = {}, args.samples
    for i, row in zip(span, part.select(span), strict=True):
        problem = _problem(row, args.instruction)
        ids = [] if isinstance(problem, str) else prompt_ids(problem[0], tokenizer)
        if len(ids) + args.max_new_tokens > sampler.positions:
            problem = "prompt_too_long"
        problems[i] = problem if isinstance(problem, str) else (row["id"], *problem[1:], ids)
    asked = [i for i in span if not isinstance(problems[i], str)]
    bar.update(k * (len(span) - len(asked)))
    outputs = asked and sampler.answer(
        [problems[i][-1] for i in asked for _ in range(k)],
        args.max_new_tokens,
        args.temperature,
        args.seed,
        [k * i + j for i in asked for j in range(k)],
        bar,
    )
    for n, i in enumerate(asked):
        id, prompt, gold, _ = problems[i]
        outcome = shortest_right(outputs[k * n : k * n + k], gold, tokenizer, grade)
        problems[i] = outcome if isinstance(outcome, str) else {"id": id, "prompt": prompt, "gold": gold} | outcome
    return [{"dropped": outcome} if isinstance(outcome, str) else outcome for outcome in problems.values()]


def make_concise(args: ConciseArguments) -> dict:
    """
    Write the rows, part by part; rows without a right response are dropped and counted.

    Returns:
        `dict`: `rows_read`, `rows_kept`, `dropped` by reason, mean `tokens` of the responses kept.

    Raises:
        Refused: inputs that are missing or do not belong together, or no row
            has a right response.
    """
    with at_work(args.output_dir):
        return _make(args)


def _make(args: ConciseArguments) -> dict:
    vocabulary, tokenizer = AbstractVocabulary.load(args.model), load_tokenizer(args.model)
    data, _ = load_prepared(args.data, tokenizer)
    rows = part_rows(args.splits, None, len(data))
    part = data.select(rows).select_columns(["id", "prompt", "prompt_ids", "answer", "gold"])
    parts = Parts(args.output_dir, phase_settings(args, rows=len(rows)))
    lengths = [args.samples * (len(ids) + args.max_new_tokens) for ids in part["prompt_ids"]]
    spans = cut(lengths, args.part_tokens)
    todo = [number for number in range(len(spans)) if not parts.done(number)]
    if todo:
        sampler, grade = load_sampler(args, args.model, tokenizer, vocabulary), cache(is_correct)
        total = args.samples * len(rows)
        ready = total - args.samples * sum(len(spans[number]) for number in todo)
        with tqdm(total=total, initial=ready, unit="response", desc="concise") as bar:
            for number in todo:
                parts.write(number, _records(args, part, spans[number], sampler, tokenizer, grade, bar))
    counts = _join(args, parts, list(map(len, spans)))
    parts.remove()
    return counts


def _join(args: ConciseArguments, parts: Parts, sizes: list[int]) -> dict:
    dropped: Counter[str] = Counter()
    kept, tokens, n_rows = 0, 0, sum(sizes)
    with written_whole(args.output_dir) as folder:
        with open(folder / ROWS_FILE, "w") as file:
            for record in parts.records(range(len(sizes)), sizes):
                if "dropped" in record:
                    dropped[record["dropped"]] += 1
                    continue
                tokens, kept = tokens + record["tokens"], kept + 1
                row = {key: record[key] for key in ("prompt", "cot", "answer", "gold", "id")}
                file.write(json.dumps(row) + "\n")
        if not kept:
            raise Refused(f"{args.model} answered none of {n_rows} rows right ({dict(dropped)}): no row to train on")
        counts = {"rows_read": n_rows, "rows_kept": kept, "dropped": dict(dropped), "tokens": tokens / kept}
        (folder / COUNTS_FILE).write_text(json.dumps(counts, indent=2) + "\n")
    return counts
