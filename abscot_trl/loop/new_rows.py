"""What `abscot new` learns of the rows that a recipe trains on, and of those that it holds out."""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from abscot_trl.data.arguments import DataArguments
from abscot_trl.data.dolci import RowRejected, is_hub_id, iter_rows, pack, unpack
from abscot_trl.data.problems import load_problems, problem_to_example
from abscot_trl.data.rows import KEPT, RowMaker, to_example
from abscot_trl.errors import Refused
from abscot_trl.training.steps import GAUGE_ROWS, ROWS_A_PROBE
from abscot_trl.vocabulary import AbstractVocabulary

MATH500, RL_PROMPTS = "HuggingFaceH4/MATH-500", "allenai/Dolci-Think-RL-7B"
ROWS = 30_000  # of a recipe: 2 phases of 15,000
READ, SAMPLE = 200_000, 2_000  # rows looked at, and tokenised
HELD_OUT = 500  # problems at most, as many as MATH-500's
STEP_ROWS = 24  # rows of a step; at least, in packs
EPOCHS = 3  # of a phase over its rows
STEPS = 100  # of a phase: where packs of 8192 tokens make fewer, rows are not packed
LONGEST = 32_768


def power_of_two(n: float) -> int:
    """The smallest one that is not under `n`."""
    return 1 << max(0, math.ceil(n) - 1).bit_length()


@dataclass(frozen=True)
class Rows:
    """
    What a recipe trains and evaluates on.

    Args:
        kept (`int`): rows that it trains on, in all phases.
        row, bare (`int`): mean tokens of a row with its CoT and without.
        longest (`int`): tokens that a row may have, trace included.
        answer (`int`): tokens that an evaluated answer may have.
        prompts (`str`): what reinforcement learning samples answers to.
        limit (`int`, *optional*): of `abscot data`.
        fits (`str`, *optional*): how many rows fit, in words.
        lengths (`dict`): of those that fit, mean tokens as `abscot plan` takes them, where they were measured.
        packed (`bool`): whether rows are packed: on GPUs, where that leaves a phase enough steps.
        words (`str`): where these figures come from.
    """

    data: str
    data_format: str
    problems: str
    kept: int = ROWS
    row: int = 5000
    bare: int = 1000
    longest: int = 8192
    answer: int = 2048
    prompts: str = RL_PROMPTS
    limit: int | None = ROWS
    fits: str | None = None
    lengths: dict[str, int] = field(default_factory=dict)
    packed: bool = True
    words: str = f"lengths are assumed (5000 tokens a row), and that {ROWS} rows are there: abscot data counts them"

    @property
    def dolci(self) -> bool:
        return "dolci" in self.data.lower()

    @property
    def ratio(self) -> float:
        """CoT tokens for each token of a content trace, which has about 100 of a long CoT."""
        return float(max(8, round((self.row - self.bare) / 100)))

    @property
    def m_max(self) -> int:
        return min(128, max(8, power_of_two(2 * (self.row - self.bare) / self.ratio)))

    @property
    def gauges(self) -> int | None:
        """Rows that gauges are read on, where a phase's are too few for the default but not for any."""
        affordable = self.kept // 2 // ROWS_A_PROBE
        return affordable if 2 <= affordable < GAUGE_ROWS else None

    @property
    def batch(self) -> int:
        """
        Rows of a step, 24, or fewer where only so they make some `STEPS` steps, 4 at least; packed rows with 24 or
        more in them.
        """
        if self.packed:
            return power_of_two(STEP_ROWS * self.row / self.longest)
        return min(STEP_ROWS, max(4, power_of_two(EPOCHS * self.kept / 2 / STEPS)))

    @property
    def trained(self) -> int:
        """Rows, or packed rows, of a phase B, whose are the shorter."""
        return math.ceil(self.kept / 2 * self.bare / self.longest) if self.packed else self.kept // 2


def rows_of(
    data: str,
    data_format: str | None,
    problems: str | None,
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    runs: Path,
    gpus: int,
) -> tuple[Rows, dict[Path, str]]:
    """
    The rows at `data`, and files to write: of local problems without `problems` those trained on and those held out.

    Raises:
        Refused: nothing there, or too few rows to train on; problems that are none.
    """
    if problems and not is_hub_id(problems):
        load_problems(problems, limit=1)
    data_format = data_format or ("dolci" if "messages" in next(iter_rows(data, shuffle_buffer=0), {}) else "problems")
    if is_hub_id(data):
        fits = "of Dolci about 22 % fits at 8192, 44 % at 16384, 90 % at 24576" if "dolci" in data.lower() else None
        known = {"longest": min(8192, positions), "fits": fits, "packed": gpus > 0}
        return Rows(data, data_format, problems or MATH500, **known), {}
    given, rows, parts, held = data, iter_rows(data, shuffle_buffer=0), {}, ""
    if data_format == "problems" and not problems:
        rows, tested = held_out(list(rows))
        held = f", {len(tested)} others held out"
        data, problems = str(runs / "train.jsonl"), str(runs / "problems.jsonl")
        parts = {Path(data): _lines(rows), Path(problems): _lines(tested)}
    found = measured(rows, given, data_format, tokenizer, positions, gpus)
    prompts = data if data_format == "problems" else RL_PROMPTS
    words = found.pop("words") + held
    return Rows(data, data_format, problems or MATH500, prompts=prompts, words=words, **found), parts


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def held_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The rows without a tenth of the problems, drawn at random, and these, one row each. Rows of no problem stay."""
    asked = [_asked(row) for row in rows]
    problems = sorted({text for text in asked if text})
    chosen = set(random.Random(0).sample(problems, min(HELD_OUT, -(-len(problems) // 10))))
    tested = {text: row for text, row in zip(asked, rows, strict=True) if text in chosen}
    return [row for text, row in zip(asked, rows, strict=True) if text not in chosen], list(tested.values())


def _asked(row: dict) -> str | None:
    try:
        example = problem_to_example(row)
    except RowRejected:
        return None
    return example.prompt[-1]["content"] if example.gold else None


def _left_out(sample: list[tuple[int, bytes]], outcomes: list[str], data_format: str) -> str:
    """Rows that are left out, counted by reason, and what is wrong with the first; nothing where there are none."""
    left = [(row, outcome) for (_, row), outcome in zip(sample, outcomes, strict=True) if outcome not in KEPT]
    if not left:
        return ""
    counts = ", ".join(f"{outcome.partition('.')[2]} {n}" for outcome, n in Counter(name for _, name in left).items())
    try:
        to_example(unpack(left[0][0]), data_format)
    except RowRejected as error:
        counts += f"; the first: {error}"
    return f" (left out: {counts})"


def measured(
    rows: Iterable[dict], data: str, data_format: str, tokenizer: PreTrainedTokenizerBase, positions: int, gpus: int
) -> dict:
    """
    Fields of `Rows` by what `abscot data` would make of the rows: of all, or of 2,000 drawn from more.

    Raises:
        Refused: fewer than 12 rows to train on.
    """
    draw, sample, n = random.Random(0), [], 0
    for n, row in enumerate(islice(rows, READ), 1):
        at = n - 1 if n <= SAMPLE else draw.randrange(n)
        if at < SAMPLE:
            sample[at : at + 1] = [(n, pack(row))]
    arguments = DataArguments(data=[data], tokenizer="", output_dir="", data_format=data_format)
    outcomes, table = RowMaker(arguments, tokenizer, AbstractVocabulary())(sample)
    out = _left_out(sample, outcomes, data_format)
    if len(table) < 12:
        raise Refused(f"{data}: {len(table)} of {n} rows can be trained on as {data_format}{out}; 12 are needed")
    tokens = {name: pc.list_value_length(table[f"{name}_ids"]).to_numpy() for name in ("prompt", "cot", "answer")}
    prompt, cot, answer = tokens.values()
    bare = prompt + answer
    found = {"row": round((bare + cot).mean()), "bare": round(bare.mean())}
    total = bare + cot + Rows("", "", "", **found).m_max + 2
    whole = power_of_two(max(64, total.max()))
    longest = 8192 if gpus else whole
    while gpus and (total > longest).mean() > 0.1 and longest < LONGEST:
        longest *= 2
    longest = min(longest, positions)
    fits = total <= longest
    fitting = int(fits.sum())
    kept = fitting if n <= SAMPLE else int(0.95 * n * fitting / len(sample))  # less what a draw may err by
    if kept < 12:
        raise Refused(f"{data}: {kept} of {n} rows fit the model's {positions} positions; 12 are needed")
    limit, kept = ROWS if kept > ROWS else None, min(kept, ROWS) // 6 * 6
    packs = Rows(data, data_format, "", kept=kept, longest=longest, **found)
    packed = gpus > 0 and EPOCHS * packs.trained >= STEPS * max(packs.batch, gpus)
    longest = longest if packed else min(longest, whole)
    lengths = {f"{name}_tokens": round(values[fits].mean()) for name, values in tokens.items()}
    words = f"{fitting} of {len(sample)} rows fit" + (f", drawn from {n}" if n > SAMPLE else "")
    replies = 2048 if data_format == "dolci" else min(2048, max(64, power_of_two(2 * answer.max())))
    return found | {
        "kept": kept, "longest": longest, "answer": replies, "limit": limit, "fits": words, "lengths": lengths,
        "packed": packed, "words": f"{data}: {words}{out}",
    }  # fmt: skip
