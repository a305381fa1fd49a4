"""
A checkpoint as an evaluation harness sees it: messages in, the answer after a trace out.

`harness_lm_eval.py` and `harness_lighteval.py` make [`Ask`]s of their harness's requests. Prompts, traces, swaps and
each row's seed are those of `abscot evaluate` in abstract mode.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean

import jinja2
from tqdm import tqdm

from abscot_trl.checkpoint import load_tokenizer
from abscot_trl.data.problems import with_instruction
from abscot_trl.errors import Refused
from abscot_trl.evaluation.answering import SAMPLE, tokens_reaching
from abscot_trl.evaluation.arguments import HarnessArguments
from abscot_trl.evaluation.swaps import swap_traces
from abscot_trl.examples import Example, prompt_ids
from abscot_trl.traces.backends import load_sampler
from abscot_trl.vocabulary import AbstractVocabulary

NO_LIKELIHOOD = (
    "abscot gives no log-likelihoods: an answer's probability is a sum over all traces, and no sampler here scores a "
    "given text. Choose a task that generates its answer (lm_eval: output_type generate_until; lighteval: a "
    "generative metric)"
)


@dataclass
class Ask:
    """The `sample`-th answer wanted to the `problem`-th problem of a task; it ends before any text of `until`."""

    task: str
    problem: int
    sample: int
    messages: list[dict[str, str]]
    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 takes all tokens
    until: list[str] = field(default_factory=list)


class TracedModel:
    """
    Answers after traces, and counts tokens.

    Raises:
        Refused: `pretrained` is no extended checkpoint.
    """

    def __init__(self, args: HarnessArguments):
        self.args, self.vocabulary = args, AbstractVocabulary.load(args.pretrained)
        self.tokenizer = load_tokenizer(args.pretrained)
        self.codebook = self.vocabulary.ids(self.tokenizer)
        self.sampler = load_sampler(args, args.pretrained, self.tokenizer, self.vocabulary)
        self.answers: dict[str, list[dict]] = defaultdict(list)  # of each task

    def answer(self, asks: list[Ask]) -> list[dict]:
        """
        Returns:
            `dict` with `text` (of the answer alone), `trace` (codebook indices), `answer_tokens`, `truncated` and
            `swapped` for each ask.

        Raises:
            Refused: samples of which nothing is drawn, or a prompt without room for its answer.
        """
        args, limits = self.args, (self.vocabulary.m_max, self.vocabulary.m_min, self.args.trace_temperature)
        if any(ask.sample and not ask.temperature for ask in asks) and not args.trace_temperature:
            raise Refused("several answers a problem at temperature 0 are one and the same; raise trace_temperature")
        prompts, rows = [self._prompt(ask) for ask in asks], [ask.problem + ask.sample * SAMPLE for ask in asks]
        index, answers, settings = {token: i for i, token in enumerate(self.codebook)}, {}, defaultdict(list)
        for i, ask in enumerate(asks):
            settings[ask.max_new_tokens, ask.temperature, ask.top_p, ask.top_k].append(i)
        with tqdm(total=2 * len(asks), desc=f"traces, then answers after {args.swap}") as bar:
            sampled = self.sampler.sample(prompts, *limits, args.seed, rows, bar)
            own = [[index[token] for token in trace.token_ids] for trace in sampled]
            traces = self._swapped(asks, own)
            for (length, temperature, top_p, top_k), some in settings.items():
                prefixes = [self._prefix(prompts[i], traces[i]) for i in some]
                given = (temperature, args.seed, [rows[i] for i in some], bar, top_p, top_k)
                found = self.sampler.answer(prefixes, length, *given)
                for i, output in zip(some, found, strict=True):
                    text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
                    end = min((text.find(stop) for stop in asks[i].until if stop and stop in text), default=None)
                    tokens = len(output.token_ids)
                    if end is not None:
                        tokens = tokens_reaching(output.token_ids, end, self.tokenizer)
                    counts = {"answer_tokens": tokens, "truncated": output.truncated and end is None}
                    answers[i] = {"text": text[:end], "trace": traces[i], **counts, "swapped": traces[i] != own[i]}
                    self.answers[asks[i].task].append(answers[i])
        return [answers[i] for i in range(len(asks))]

    def _prompt(self, ask: Ask) -> list[int]:
        messages, kind, positions = ask.messages, self.args.instruction, self.sampler.positions
        try:
            if kind != "none":
                messages = with_instruction(Example(messages, "", "", id=ask.task, source=kind), "abstract")
            ids = prompt_ids(messages, self.tokenizer)
        except jinja2.TemplateError as error:
            raise Refused(f"{self.args.pretrained}: its chat template refuses {ask.task} ({error})") from error
        if len(ids) + self.vocabulary.m_max + 2 + ask.max_new_tokens > positions:
            raise Refused(
                f"{ask.task}: a prompt of {len(ids)} tokens, {self.vocabulary.m_max + 2} for a trace and "
                f"{ask.max_new_tokens} for an answer exceed the model's {positions} positions; lower max_gen_toks "
                "(lighteval: the task's generation_size) or the few-shot examples"
            )
        return ids

    def _prefix(self, prompt: list[int], trace: list[int]) -> list[int]:
        return [*prompt, self.sampler.begin, *(self.codebook[i] for i in trace), self.sampler.end]

    def _swapped(self, asks: list[Ask], own: list[list[int]]) -> list[list[int]]:
        """The traces to answer after; those of one task and sample are swapped together, as in `abscot evaluate`."""
        groups, swapped, seed = defaultdict(list), list(own), self.args.seed
        for i in sorted(range(len(asks)), key=lambda i: asks[i].problem):
            groups[asks[i].task, asks[i].sample].append(i)
        for (_, sample), some in groups.items():
            drawn = [seed, sample] if sample else seed
            traces = swap_traces([own[i] for i in some], self.args.swap, self.vocabulary.size, drawn)
            for i, trace in zip(some, traces, strict=True):
                swapped[i] = trace
        return swapped

    def summary(self) -> dict[str, dict]:
        """Of each task: how many answers, mean tokens, how many answers the limit cut, the share of swapped traces."""
        return {
            task: {
                "answers": len(answers),
                "trace_tokens": fmean(len(answer["trace"]) for answer in answers),
                **{name: fmean(answer[name] for answer in answers) for name in ("answer_tokens", "swapped")},
                "truncated": sum(answer["truncated"] for answer in answers),
            }
            for task, answers in self.answers.items()
        }

    def words(self) -> list[str]:
        """The summary, a line a task."""
        return [
            f"{task}, swap {self.args.swap}: {row['answers']} answers, on average {row['trace_tokens']:.1f} tokens of "
            f"trace and {row['answer_tokens']:.1f} of answer; {row['truncated']} answers cut at the limit, "
            f"{row['swapped']:.0%} of the traces changed by the swap"
            for task, row in self.summary().items()
        ]
