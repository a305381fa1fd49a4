r"""
Answers to a span of problems in one mode and after one swap, graded.

Tokens are counted by ids, reasoning and answer apart. In abstract mode `trace_tokens` are codebook tokens and the two
delimiters are left out of all counts; in verbal mode they are what precedes the answer: everything up to `</think>`,
or else the lines before the one with the last \boxed{} (or the last that begins with "Answer:"); in direct mode there
are none. Of a swapped chain of thought they are what was kept of it; what was forced after it counts as the answer's.
"""

import functools
from collections.abc import Callable

import jinja2
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from abscot_trl.data.problems import ALPACAEVAL, kind_of, with_instruction
from abscot_trl.errors import Refused
from abscot_trl.evaluation.arguments import EvaluateArguments
from abscot_trl.evaluation.grading import RIGHT, extract_answer, score, stated
from abscot_trl.evaluation.swaps import answer_start, donors, swap_steps, swap_traces, verbal_prefix
from abscot_trl.examples import Example, prompt_ids
from abscot_trl.traces.batching import cut
from abscot_trl.traces.constraint import Continuation
from abscot_trl.vocabulary import AbstractVocabulary

Row = tuple[int, int]  # a problem's number, and the sample's
SAMPLE = 2**20  # sample s of problem i is the sampler's row i + s * SAMPLE: its seed, whatever the number of either
FORCED = 128  # most tokens of an answer that is forced after a swapped chain of thought


def tokens_reaching(token_ids: list[int], end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The fewest tokens whose text is at least `end` characters long; a text grows with its tokens."""
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(tokenizer.decode(token_ids[:middle])) >= end else (middle + 1, high)
    return low


def verbal_reasoning_tokens(token_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of a verbal response's tokens precede its answer (see the module's docstring)."""
    return tokens_reaching(token_ids, answer_start(tokenizer.decode(token_ids)) or 0, tokenizer)


def first_line(output: Continuation, tokenizer: PreTrainedTokenizerBase) -> Continuation:
    """A forced answer ends with its line: some models would take up their reasoning again on the next."""
    end = tokenizer.decode(output.token_ids).find("\n")
    if end < 0:
        return output
    return Continuation(output.token_ids[: tokens_reaching(output.token_ids, end, tokenizer)], truncated=False)


class Answerer:
    """
    Answers problems by one model and grades the answers.

    Args:
        sampler: any of `abscot_trl.traces.backends.load_sampler`.
        problems (`list[Example]`): all of them; the spans to answer are taken from these.
        vocabulary ([`AbstractVocabulary`], *optional*): needed for abstract mode.
        own (`Callable`): gives of a mode the records of all problems without a swap; asked for only by swaps.

    Raises:
        Refused: a prompt that leaves no room for its answer.
    """

    def __init__(
        self,
        sampler,
        tokenizer: PreTrainedTokenizerBase,
        problems: list[Example],
        args: EvaluateArguments,
        vocabulary: AbstractVocabulary | None,
        own: Callable[[str], list[dict]],
    ):
        self.sampler, self.tokenizer, self.problems, self.args = sampler, tokenizer, problems, args
        self.vocabulary, self.own = vocabulary, functools.cache(own)
        self.codebook = vocabulary.ids(tokenizer) if vocabulary is not None else []
        self.grade, self.swapped = functools.cache(score), functools.lru_cache(maxsize=1)(self._swapped)
        self.donors = functools.cache(lambda sample: donors(len(problems), self._seed(sample)))
        self.prompts, self.most = {}, {"direct": 0, "verbal": 0}
        if "abstract" in args.modes:
            self.most["abstract"] = (args.pause_tokens or vocabulary.m_max) + 2
        if args.swaps_of("verbal") != ["own"]:
            self.most["verbal"] = 2 * FORCED  # a shuffled chain of thought may take a few tokens more, too
        for mode in args.modes:
            messages = [with_instruction(p, mode) if args.instruction else p.prompt for p in problems]
            try:
                self.prompts[mode] = [prompt_ids(message, tokenizer) for message in messages]
            except jinja2.TemplateError as error:
                raise Refused(f"{args.model}: its chat template refuses the problems ({error})") from error
            longest = max(map(len, self.prompts[mode]))
            if longest + self.most[mode] + args.max_new_tokens > sampler.positions:
                raise Refused(
                    f"{mode} mode: a prompt of {longest} tokens, {self.most[mode]} for a trace or a forced answer and "
                    f"max_new_tokens {args.max_new_tokens} exceed the model's {sampler.positions} positions; lower "
                    "max_new_tokens"
                )

    def answer(self, mode: str, swap: str, span: range, bar: tqdm | None = None) -> list[dict]:
        """
        Graded answers to the problems of `span`, `samples_of(mode)` each, as in `answers.jsonl`.

        For their own traces problems are taken in parts that the engine's cache holds, and a part is answered right
        after its traces were written, so that the answers do not pay for the prompts again.
        """
        parts, samples = [span], self.args.samples_of(mode)
        if mode == "abstract" and swap == "own":
            most = self.most[mode] + self.args.max_new_tokens
            lengths = [len(self.prompts[mode][problem]) + samples * most for problem in span]
            parts = [span[part.start : part.stop] for part in cut(lengths, self.sampler.cache_tokens)]
        answer = {"abstract": self._after_traces, "direct": self._after_prompts}.get(
            mode, self._after_prompts if swap == "own" else self._after_steps
        )
        return [
            record
            for part in parts
            for record in answer(mode, swap, [(p, s) for p in part for s in range(samples)], bar)
        ]

    def _continue(
        self, prefixes: list[list[int]], rows: list[Row], bar: tqdm | None, length: int
    ) -> list[Continuation]:
        args, numbers = self.args, [problem + sample * SAMPLE for problem, sample in rows]
        return self.sampler.answer(
            prefixes, length, args.temperature, args.seed, numbers, bar, top_p=args.top_p, top_k=args.top_k
        )

    def _after_prompts(self, mode: str, swap: str, rows: list[Row], bar: tqdm | None) -> list[dict]:
        outputs = self._continue([self.prompts[mode][p] for p, _ in rows], rows, bar, self.args.max_new_tokens)
        spent = [verbal_reasoning_tokens(o.token_ids, self.tokenizer) if mode == "verbal" else 0 for o in outputs]
        return [
            self._record(mode, swap, row, output, n, len(output.token_ids) - n)
            for row, output, n in zip(rows, outputs, spent, strict=True)
        ]

    def _after_traces(self, mode: str, swap: str, rows: list[Row], bar: tqdm | None) -> list[dict]:
        own = [self._own_of(mode, row)["trace"] for row in rows] if swap != "own" else self._traces(rows)
        traces = [self.swapped(mode, swap)[row] for row in rows] if swap != "own" else own
        prefixes = [
            [*self.prompts[mode][p], self.sampler.begin, *(self.codebook[i] for i in trace), self.sampler.end]
            for (p, _), trace in zip(rows, traces, strict=True)
        ]
        outputs = self._continue(prefixes, rows, bar, self.args.max_new_tokens)
        return [
            self._record(
                mode, swap, row, output, len(trace), len(output.token_ids), trace=trace, swapped=trace != before
            )
            for row, output, trace, before in zip(rows, outputs, traces, own, strict=True)
        ]

    def _after_steps(self, mode: str, swap: str, rows: list[Row], bar: tqdm | None) -> list[dict]:
        """The answer alone, after the steps of the model's own chain of thought were swapped."""
        responses = [self._own_of(mode, row)["response"] for row in rows]
        kept = [self.swapped(mode, swap)[row] for row in rows]
        own = swap_steps(responses, "own", self.tokenizer)
        given = zip(responses, (self.problems[p].source for p, _ in rows), strict=True)
        ends = [verbal_prefix(response, source, self.args.answer_stub) for response, source in given]
        ids = [[self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in end] for end in ends]
        prefixes = [
            [*self.prompts[mode][p], *opening, *steps, *closing]
            for (p, _), steps, (opening, closing) in zip(rows, kept, ids, strict=True)
        ]
        outputs = self._continue(prefixes, rows, bar, min(FORCED, self.args.max_new_tokens))
        outputs = [first_line(output, self.tokenizer) for output in outputs]
        records = []
        for i, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            length = len(ids[i][1]) + len(output.token_ids)
            said = ends[i][1].rpartition("\n")[2]
            record = self._record(mode, swap, row, output, len(kept[i]), length, said, swapped=kept[i] != own[i])
            records.append(record)
        return records

    def _own_of(self, mode: str, row: Row) -> dict:
        problem, sample = row
        return self.own(mode)[problem * self.args.samples_of(mode) + sample]

    def _seed(self, sample: int) -> int | list[int]:
        """Of the draws of the swaps."""
        return [self.args.seed, sample] if sample else self.args.seed

    def _following(self, row: Row, response: str) -> dict:
        """
        Whether the answer is that of the donor, the problem whose trace it came after (`follows`), and whether it is
        that of the donor's own donor, whose trace it has not seen (`follows_chance`). `None` where the answer of that
        other problem is right here too.
        """
        problem, drawn = self.problems[row[0]], self.donors(row[1])

        def given(other: Example) -> bool | None:
            if self.grade(stated(other.gold, problem.source), problem.gold, problem.source, problem.entry) >= RIGHT:
                return None
            return self.grade(response, other.gold, other.source, other.entry) >= RIGHT

        donor, unseen = self.problems[drawn[row[0]]], self.problems[drawn[drawn[row[0]]]]
        return {"donor": donor.id, "follows": given(donor), "follows_chance": given(unseen)}

    def _swapped(self, mode: str, swap: str) -> dict[Row, list[int]]:
        """What each row answers after: a trace, or a chain of thought's token ids. Samples are swapped one by one."""
        swapped, samples = {}, self.args.samples_of(mode)
        for sample in range(samples):
            own, seed = self.own(mode)[sample::samples], self._seed(sample)
            if mode == "abstract":
                replacements = swap_traces([record["trace"] for record in own], swap, self.vocabulary.size, seed)
            else:
                replacements = swap_steps([record["response"] for record in own], swap, self.tokenizer, seed)
            swapped |= {(problem, sample): each for problem, each in enumerate(replacements)}
        return swapped

    def _traces(self, rows: list[Row]) -> list[list[int]]:
        """A trace a row, as codebook indices; at temperature 0 the samples of a problem share one."""
        args, index = self.args, {token: i for i, token in enumerate(self.codebook)}
        if args.pause_tokens:
            return [[0] * args.pause_tokens for _ in rows]
        wanted = rows if args.trace_temperature > 0 else [row for row in rows if row[1] == 0]
        sampled = self.sampler.sample(
            [self.prompts["abstract"][problem] for problem, _ in wanted],
            self.vocabulary.m_max,
            self.vocabulary.m_min,
            args.trace_temperature,
            args.seed,
            [problem + sample * SAMPLE for problem, sample in wanted],
        )
        traces = {row: [index[token] for token in trace.token_ids] for row, trace in zip(wanted, sampled, strict=True)}
        return [traces[row if row in traces else (row[0], 0)] for row in rows]

    def _record(
        self,
        mode: str,
        swap: str,
        row: Row,
        output: Continuation,
        trace_tokens: int,
        answer_tokens: int,
        said: str = "",
        trace: list[int] | None = None,
        swapped: bool = False,
    ) -> dict:
        problem = self.problems[row[0]]
        response = said + self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        graded = kind_of(problem.source) != ALPACAEVAL
        return {
            "model": self.args.name,
            "task": self.args.task,
            "mode": mode,
            "swap": swap,
            "source": problem.source,
            "id": problem.id,
            "sample": row[1],
            "problem": problem.prompt[-1]["content"],
            "trace": trace or [],
            "response": response,
            "answer": extract_answer(response, problem.source) if graded else None,
            "gold": problem.gold,
            "score": self.grade(response, problem.gold, problem.source, problem.entry) if graded else None,
            "trace_tokens": trace_tokens,
            "answer_tokens": answer_tokens,
            "truncated": output.truncated,
            "swapped": swapped,
            **(self._following(row, response) if swap == "other" else {}),
        }
