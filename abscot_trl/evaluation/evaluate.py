"""
`abscot evaluate`: a model on a file of problems, in verbal, direct and abstract mode, with every swap of the trace.

Tokens are counted by ids, reasoning and answer apart. In abstract mode `trace_tokens` are codebook tokens and the two
delimiters are left out of all counts; in verbal mode they are what precedes the answer: everything up to `</think>`,
or else the lines before the one with the last \\boxed{}; in direct mode there are none.
"""

import functools
import json
from dataclasses import dataclass, field
from statistics import fmean, stdev

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from abscot_trl.checkpoint import written_whole
from abscot_trl.data.problems import HOTPOTQA, MODES, load_problems, with_instruction
from abscot_trl.evaluation.grading import hotpot_scores, is_correct, short_answer, wilson_interval
from abscot_trl.evaluation.swaps import check_swap, swap_traces
from abscot_trl.examples import Example, prompt_ids
from abscot_trl.traces.backends import SamplerArguments, load_sampler
from abscot_trl.traces.batching import cut
from abscot_trl.traces.constraint import Continuation
from abscot_trl.vocabulary import AbstractVocabulary


@dataclass
class EvaluateArguments(SamplerArguments):
    """
    Score a model on a file of problems.

    Args:
        model (`str`): a checkpoint; `verbal` and `direct` take any model, `abstract` an extended one.
        problems (`str`): hub id or file of problems with their gold answers.
        output_dir (`str`): where `results.json` and `answers.jsonl` go.
        name (`str`): what `results.json` calls the model (`informed`, `paper`, `sft`, `base`, ..).
        task (`str`): what it calls the problems. HotpotQA rows are scored by F1, all else by math-verify.
        modes, swaps (`list[str]`): what to run; swaps apply to `abstract`.
        pause_tokens (`int`): over 0: in `abstract` mode the model writes no trace; it answers after so many copies of
            the first codebook token (the `pause` baseline).
    """

    model: str = field(metadata={"help": "Checkpoint folder or hub id."})
    problems: str = field(metadata={"help": "Hub id or file (.jsonl, .parquet) of problems with gold answers."})
    output_dir: str = field(metadata={"help": "Where results.json and answers.jsonl go."})
    name: str = field(default="model", metadata={"help": "The model's name in results.json."})
    task: str = field(default="math", metadata={"help": "The task's name in results.json."})
    problems_split: str = field(default="test", metadata={"help": "Split, for a hub id."})
    problems_config: str | None = field(default=None, metadata={"help": "Configuration, for a hub id (gsm8k: main)."})
    modes: list[str] = field(
        default_factory=lambda: ["abstract"], metadata={"help": "Any of verbal, direct, abstract."}
    )
    swaps: list[str] = field(
        default_factory=lambda: ["own", "random", "shuffled", "other", "none"],
        metadata={"help": "Traces to answer after in abstract mode: own, random, shuffled, other, none, cut:<k>."},
    )
    pause_tokens: int = field(
        default=0, metadata={"help": "Answer after so many copies of the first codebook token in place of a trace."}
    )
    instruction: bool = field(default=True, metadata={"help": "Append the mode's instruction to the prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first so many problems."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest answer (verbal: CoT and answer)."})
    trace_temperature: float = field(default=0.0, metadata={"help": "Temperature of the trace; 0 is greedy."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answer; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of the swaps."})

    def __post_init__(self):
        super().__post_init__()
        if (self.engine or {}).get("data_parallel_size", 1) > 1:
            raise ValueError("engine: data_parallel_size is for `abscot traces`; evaluate with backend: server")
        for name, low in (("limit", 1), ("max_new_tokens", 1), ("seed", 0), ("pause_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if self.temperature < 0 or self.trace_temperature < 0:
            raise ValueError(f"temperatures must not be negative, got {self.trace_temperature} and {self.temperature}")
        if not self.modes or not self.swaps:
            raise ValueError("modes and swaps must name at least one each")
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"modes: {mode!r} is not one of {', '.join(MODES)}")
        for swap in self.swaps:
            check_swap(swap)


def verbal_reasoning_tokens(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a verbal response's tokens precede its answer (see the module's docstring)."""
    text = tokenizer.decode(token_ids)
    if "</think>" in text:
        start = text.index("</think>") + len("</think>")
    elif "\\boxed" in text:
        start = text.rfind("\n", 0, text.rindex("\\boxed")) + 1
    else:
        return 0
    low, high = 0, len(token_ids)  # fewest tokens whose text reaches `start`; decoding grows with the prefix
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(tokenizer.decode(token_ids[:middle])) >= start else (middle + 1, high)
    return low


def score(response: str, gold: str, source: str) -> float:
    """1 or 0 for boxed answers, F1 in 0..1 for HotpotQA: as the problem's instruction asked."""
    return hotpot_scores(short_answer(response), gold)[1] if source == HOTPOTQA else float(is_correct(response, gold))


def evaluate_model(
    sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Example],
    args: EvaluateArguments,
    vocabulary: AbstractVocabulary | None = None,
) -> tuple[list[dict], list[dict]]:
    """
    Run every mode and swap.

    Args:
        sampler: any of `abscot_trl.traces.backends.load_sampler`.

    Returns:
        The rows of `results.json`, and one record an answer (problem id, mode, swap, trace, response, score).
    """
    if not problems or any(problem.gold is None for problem in problems):
        raise ValueError(f"{args.problems}: {len(problems)} problems, and each needs a gold answer to be graded")
    if "abstract" in args.modes and "other" in args.swaps and len(problems) < 2:
        raise ValueError(f"{args.problems}: swap 'other' needs at least two problems")
    if "abstract" in args.modes and vocabulary is None:
        raise ValueError(f"{args.model}: abstract mode needs an extended checkpoint; run `abscot init` first")
    grade = functools.cache(score)
    results, answers = [], []

    def add(mode: str, swap: str, outputs: list[Continuation], reasoning: list[int], traces: list[list[int]]) -> dict:
        records = []
        for problem, output, spent, trace in zip(problems, outputs, reasoning, traces, strict=True):
            response = tokenizer.decode(output.token_ids, skip_special_tokens=True)
            spent_on_answer = len(output.token_ids) - (spent if mode == "verbal" else 0)
            records.append(
                {
                    "model": args.name,
                    "task": args.task,
                    "mode": mode,
                    "swap": swap,
                    "id": problem.id,
                    "trace": trace,
                    "response": response,
                    "gold": problem.gold,
                    "score": grade(response, problem.gold, problem.source),
                    "trace_tokens": spent,
                    "answer_tokens": spent_on_answer,
                    "truncated": output.truncated,
                }
            )
        answers.extend(records)
        results.append(summarise(records, args))
        return results[-1]

    for mode in args.modes:
        messages = [with_instruction(p, mode) if args.instruction else p.prompt for p in problems]
        prompts = [prompt_ids(message, tokenizer) for message in messages]
        if mode != "abstract":
            with _bar(args, mode, len(prompts)) as bar:
                outputs = sampler.answer(prompts, args.max_new_tokens, args.temperature, args.seed, bar=bar)
            spent = [verbal_reasoning_tokens(o.token_ids, tokenizer) if mode == "verbal" else 0 for o in outputs]
            add(mode, "own", outputs, spent, [[]] * len(outputs))
            continue
        traces, outputs = answer_after_traces(sampler, prompts, args, vocabulary, vocabulary.ids(tokenizer))
        for swap in args.swaps:
            result = add(mode, swap, outputs[swap], [len(trace) for trace in traces[swap]], traces[swap])
            # A swap that leaves most traces as they were (all equal, or of one token) tells nothing.
            result["swapped"] = fmean(a != b for a, b in zip(traces[swap], traces["own"], strict=True))
    return results, answers


def _bar(args: EvaluateArguments, title: str, total: int) -> tqdm:
    return tqdm(total=total, unit="row", desc=f"{args.name} {title}")


def answer_after_traces(
    sampler, prompts: list[list[int]], args: EvaluateArguments, vocabulary: AbstractVocabulary, codebook: list[int]
) -> tuple[dict[str, list[list[int]]], dict[str, list[Continuation]]]:
    """
    The two calls of abstract mode, for every swap of the trace.

    Prompts are taken in spans that the engine's cache holds, and a span is answered right after its traces were
    written, so that the answers do not pay for the prompts again.

    Returns:
        By swap, the traces (codebook indices) and the answers. The model's `own` traces are always among them.
    """
    index = {token: i for i, token in enumerate(codebook)}
    most = max(vocabulary.m_max, args.pause_tokens) + 2 + args.max_new_tokens
    spans = cut([len(prompt) + most for prompt in prompts], sampler.cache_tokens)
    others = [swap for swap in args.swaps if swap != "own"]
    traces: dict[str, list] = {swap: [] for swap in ["own", *others]}
    outputs: dict[str, list] = {swap: [] for swap in args.swaps}

    def answer(swap: str, span: range, bar: tqdm) -> None:
        written = [[codebook[i] for i in traces[swap][row]] for row in span]
        prefixes = [
            [*prompts[row], sampler.begin, *trace, sampler.end] for row, trace in zip(span, written, strict=True)
        ]
        outputs[swap] += sampler.answer(prefixes, args.max_new_tokens, args.temperature, args.seed, span, bar)

    with _bar(args, "traces", len(prompts)) as bar, _bar(args, "answers", len(prompts) * len(args.swaps)) as answered:
        for span in spans:
            if args.pause_tokens:
                traces["own"] += [[0] * args.pause_tokens for _ in span]
            else:
                sampled = sampler.sample(
                    [prompts[row] for row in span],
                    vocabulary.m_max,
                    vocabulary.m_min,
                    args.trace_temperature,
                    args.seed,
                    span,
                    bar,
                )
                traces["own"] += [[index[token] for token in trace.token_ids] for trace in sampled]
            if "own" in outputs:
                answer("own", span, answered)
        for swap in others:
            traces[swap] = swap_traces(traces["own"], swap, vocabulary.size, args.seed)
        for span in spans:
            for swap in others:
                answer(swap, span, answered)
    return traces, outputs


def summarise(records: list[dict], args: EvaluateArguments) -> dict:
    """One row of `results.json` from the answers of one model, mode and swap."""
    scores = [record["score"] for record in records]
    correct = sum(scores)
    if all(score in (0.0, 1.0) for score in scores):
        interval = wilson_interval(round(correct), len(scores))
    else:  # F1: the normal interval of a mean
        half = 196 * stdev(scores) / len(scores) ** 0.5
        interval = (max(0.0, 100 * fmean(scores) - half), min(100.0, 100 * fmean(scores) + half))
    trace, answer = (fmean(record[key] for record in records) for key in ("trace_tokens", "answer_tokens"))
    return {
        **{key: records[0][key] for key in ("model", "task", "mode", "swap")},
        "n": len(scores),
        "accuracy": 100 * correct / len(scores),
        "ci95": list(interval),
        "trace_tokens": trace,
        "answer_tokens": answer,
        "tokens": trace + answer,
        "truncated": sum(record["truncated"] for record in records),
        "decoding": {
            "backend": args.backend,
            "trace_temperature": args.trace_temperature,
            "temperature": args.temperature,
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
        },
    }


def evaluate(args: EvaluateArguments) -> list[dict]:
    """`abscot evaluate`: load, run, write `results.json` and `answers.jsonl`; returns the results."""
    vocabulary = AbstractVocabulary.load(args.model) if "abstract" in args.modes else None
    problems = load_problems(args.problems, args.problems_split, args.problems_config, args.limit)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with written_whole(args.output_dir) as folder:
        sampler = load_sampler(args, args.model, tokenizer, vocabulary)
        results, answers = evaluate_model(sampler, tokenizer, problems, args, vocabulary)
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return results
