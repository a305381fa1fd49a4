"""
`abscot evaluate`: a model on a file of problems, in verbal, direct and abstract mode, with every swap.

The work is cut into parts, a span of problems in one mode after one swap each. A finished part is a file and is never
made again; when all are there they are joined.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.problems import ALPACAEVAL, GYM, HOTPOTQA, kind_of, load_problems
from abscot_trl.errors import Refused
from abscot_trl.evaluation.answering import Answerer
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.results import write_results
from abscot_trl.evaluation.statistics import describe_answers, summarise
from abscot_trl.examples import Example
from abscot_trl.storage import Parts, at_work, check_folder, phase_settings, written_whole
from abscot_trl.traces.backends import load_sampler
from abscot_trl.vocabulary import AbstractVocabulary

ANSWER_FILE, OUTPUT_FILE, UNGRADED_FILE = "answers.jsonl", "outputs.json", "ungraded.json"
KINDS = dict.fromkeys(("model", "task", "mode", "swap", "problem", "response"), str)  # of an answer in a part
KINDS |= dict.fromkeys(("trace_tokens", "answer_tokens", "truncated", "swapped"), int | float)
KINDS |= {"trace": list, "answer": str | None, "score": int | float | None}
FOLLOWING = {"donor": str, "follows": bool | None, "follows_chance": bool | None}  # of one after the swap `other`


def check_problems(problems: list[Example], args: EvaluateArguments) -> str:
    """
    Returns:
        `str`: the problems' source.

    Raises:
        Refused: none, one without gold, an id twice, kinds that are scored by different measures, too few for a
            swap, or AlpacaEval's with several answers a prompt.
    """
    kinds = {kind_of(problem.source) for problem in problems}
    if not problems:
        raise Refused(f"{args.problems} holds no problem")
    if len(kinds) > 1 and kinds & {ALPACAEVAL, HOTPOTQA, GYM}:
        raise Refused(f"{args.problems} mixes {', '.join(sorted(kinds))} problems, which have no common measure")
    if kinds != {ALPACAEVAL} and any(problem.gold is None for problem in problems):
        raise Refused(f"{args.problems}: each problem needs a gold answer to be graded")
    twice = [id for id, n in Counter(problem.id for problem in problems).items() if n > 1]
    if twice:
        raise Refused(f"{args.problems}: id {twice[0]!r} stands twice; give each problem its own, or leave ids out")
    runs = [(mode, swap) for mode in args.modes for swap in args.swaps_of(mode)]
    if ("abstract", "other") in runs and len(problems) < 2:
        raise Refused(f"{args.problems}: swap 'other' needs at least two problems")
    if kinds == {ALPACAEVAL} and (len(runs) > 1 or args.samples > 1):
        raise Refused(
            f"{args.problems}: AlpacaEval's judge compares one answer a prompt; choose one mode, swaps: [own] and "
            "samples: 1"
        )
    return problems[0].source


class Evaluation:
    """
    The parts of an evaluation, and how to make and join them.

    Args:
        problems (`list[Example]`): of one kind (see [`check_problems`]).
        vocabulary ([`AbstractVocabulary`], *optional*): needed for abstract mode.
    """

    def __init__(
        self,
        args: EvaluateArguments,
        problems: list[Example],
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: AbstractVocabulary | None,
    ):
        self.args, self.problems, self.source = args, problems, check_problems(problems, args)
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        if "abstract" in args.modes and vocabulary is None:
            raise Refused(f"{args.model}: abstract mode needs an extended checkpoint; run `abscot init` first")
        if args.pause_tokens and args.pause_tokens > vocabulary.m_max:
            raise Refused(f"pause_tokens {args.pause_tokens} exceeds m_max {vocabulary.m_max} of {args.model}")
        self.units = []
        for mode in args.modes:
            step = max(1, args.part_answers // args.samples_of(mode))
            spans = [range(i, min(i + step, len(problems))) for i in range(0, len(problems), step)]
            self.units += [(mode, swap, span) for swap in args.swaps_of(mode) for span in spans]
        self.sizes = [len(span) * args.samples_of(mode) for mode, _, span in self.units]
        text = json.dumps([[p.prompt, p.gold, p.id, p.source, *filter(None, [p.entry])] for p in problems])
        self.parts = Parts(args.output_dir, phase_settings(args, prompts=hashlib.sha256(text.encode()).hexdigest()))

    def records(self, mode: str, swap: str) -> list[dict]:
        """The answers of one mode and swap, problem by problem."""
        numbers = [number for number, unit in enumerate(self.units) if unit[:2] == (mode, swap)]
        kinds = KINDS | (FOLLOWING if swap == "other" else {})
        return list(self.parts.records(numbers, self.sizes, kinds))

    def make(self, load: Callable) -> None:
        """Make the parts that are missing; `load` gives the sampler, and is called only if one is."""
        todo = [number for number in range(len(self.units)) if not self.parts.done(number)]
        if not todo:
            return
        args, own = self.args, lambda mode: self.records(mode, "own")
        try:
            answerer = Answerer(load(), self.tokenizer, self.problems, args, self.vocabulary, own)
        except BaseException:
            if len(todo) == len(self.units):
                self.parts.remove()  # nothing to go on from, so nothing that binds to these settings
            raise
        total = sum(self.sizes)
        ready = total - sum(self.sizes[number] for number in todo)
        with tqdm(total=total, initial=ready, unit="answer", desc=args.name) as bar:
            for number in todo:
                mode, swap, span = self.units[number]
                bar.set_description(f"{args.name} {mode} {swap}")
                self.parts.write(number, answerer.answer(mode, swap, span, bar))

    def results(self) -> Iterator[dict]:
        """The rows of `results.json`; of AlpacaEval's problems without what only a judge can say."""
        for mode in self.args.modes:
            own, samples = self.records(mode, "own"), self.args.samples_of(mode)
            for swap in self.args.swaps_of(mode):
                records = own if swap == "own" else self.records(mode, swap)
                if kind_of(self.source) == ALPACAEVAL:
                    yield describe_answers(records, samples, self.args.decoding())
                else:
                    yield summarise(records, own, samples, self.source, self.args.decoding())

    def join(self) -> list[dict]:
        """Write the answers and their results into `output_dir`, whole; returns the results."""
        results, judged = list(self.results()), kind_of(self.source) == ALPACAEVAL
        with written_whole(self.args.output_dir) as folder:
            records = list(self.parts.records(range(len(self.units)), self.sizes, KINDS))
            (folder / ANSWER_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
            if judged:
                write_outputs(folder, records, self.problems, results[0])
            else:
                write_results(folder / "results.json", results)
        self.parts.remove()
        if judged:
            print(f"{self.args.output_dir}/{OUTPUT_FILE} waits for a judge: abscot alpaca --outputs ..")  # noqa: T201
        return [] if judged else results


def write_outputs(folder: Path, records: list[dict], problems: list[Example], row: dict) -> None:
    """`outputs.json` in AlpacaEval's format, and `ungraded.json`: the results' row without a score."""
    outputs = [
        {
            "instruction": record["problem"],
            "output": record["response"],
            "generator": record["model"],
            "dataset": problem.source.partition("/")[2],
        }
        for record, problem in zip(records, problems, strict=True)
    ]
    (folder / OUTPUT_FILE).write_text(json.dumps(outputs, indent=2) + "\n")
    (folder / UNGRADED_FILE).write_text(json.dumps(row, indent=2) + "\n")


def evaluate(args: EvaluateArguments) -> list[dict]:
    """
    `abscot evaluate`: answer and grade what is not done yet, write `results.json` and `answers.jsonl`.

    Returns:
        The results; none of AlpacaEval's prompts, whose `outputs.json` waits for `abscot alpaca`.

    Raises:
        Refused: `output_dir` is there already;
            problems or settings that do not fit, or parts that were begun with other settings.
    """
    check_folder(args.output_dir)
    vocabulary = AbstractVocabulary.load(args.model) if "abstract" in args.modes else None
    problems = load_problems(args.problems, args.problems_split, args.problems_config, args.limit)
    tokenizer = load_tokenizer(args.model)
    with at_work(args.output_dir):
        evaluation = Evaluation(args, problems, tokenizer, vocabulary)
        evaluation.make(lambda: load_sampler(args, args.model, tokenizer, vocabulary))
        return evaluation.join()
