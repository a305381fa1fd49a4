"""The fields of `abscot evaluate`, and of its model in another harness."""

import math
from dataclasses import dataclass, field, fields

from abscot_trl.data.problems import GPQA, HOTPOTQA, MATHS, MODES
from abscot_trl.errors import Refused
from abscot_trl.evaluation.swaps import applies, check_swap
from abscot_trl.traces.backends import SamplerArguments


@dataclass
class EvaluateArguments(SamplerArguments):
    r"""
    Score a model on a file of problems.

    Args:
        model (`str`): a checkpoint; `verbal` and `direct` take any model, `abstract` an extended one.
        problems (`str`): hub id or file of problems with their gold answers (AlpacaEval's have none), or
            `reasoning_gym:<task>?size=1000&seed=0` (`data/reasoning_gym.py`), which its task scores.
        output_dir (`str`): where `results.json` and `answers.jsonl` go. Finished parts are kept in
            `<output_dir>.parts` until all are; the same command goes on from them.
        name (`str`): what `results.json` calls the model (`informed`, `paper`, `sft`, `base`, ..).
        task (`str`): what it calls the problems. How they are asked and graded stands in their columns: HotpotQA rows
            by F1, GPQA rows by the letter, AlpacaEval rows not here (`outputs.json` goes to `abscot alpaca`), all else
            by math-verify.
        modes, swaps (`list[str]`): what to run. Each mode takes the swaps that it knows (`evaluation/swaps.py`); all
            but `own` are compared with it, problem by problem. By default abstract mode runs own, random, shuffled,
            other and none, the others own.
        samples (`int`): answers k a problem: `accuracy` is then avg@k, and maj@k and pass@k stand beside it. With
            `trace_temperature` over 0 each comes after a trace of its own, also when the answers are greedy. A mode
            in which neither trace nor answer is drawn answers once.
        temperature, top_p, top_k (`float`, `float`, `int`): of the answer; a trace is never truncated.
        pause_tokens (`int`, *optional*): in abstract mode answer after so many copies of the first codebook token in
            place of a trace (the pause-token baseline).
        answer_stub (`str`, *optional*): what the model goes on from after its swapped chain of thought in verbal mode,
            on a new line, once `</think>` has closed a thought that it had closed itself. `\boxed{`, for HotpotQA
            `Answer:`, when left out. Forced tokens count as the answer's, which ends with its line, or after 128 more.
        part_answers (`int`): answers of one file of finished work: what a kill can cost, and what vLLM has at once.
    """

    model: str = field(metadata={"help": "Checkpoint folder or hub id."})
    problems: str = field(metadata={"help": "Hub id, file (.jsonl, .parquet, .json, .csv), or reasoning_gym:<task>."})
    output_dir: str = field(metadata={"help": "Where results.json and answers.jsonl go."})
    name: str = field(default="model", metadata={"help": "The model's name in results.json."})
    task: str = field(default="math", metadata={"help": "The task's name in results.json."})
    problems_split: str = field(default="test", metadata={"help": "Split, for a hub id."})
    problems_config: str | None = field(default=None, metadata={"help": "Configuration, for a hub id (gsm8k: main)."})
    modes: list[str] = field(
        default_factory=lambda: ["abstract"], metadata={"help": "Any of verbal, direct, abstract."}
    )
    swaps: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to answer after. Abstract: own, random, shuffled, other, none, cut:<k>; verbal: own, "
            "shuffled, cut:<k>."
        },
    )
    instruction: bool = field(default=True, metadata={"help": "Append the mode's instruction to the prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first so many problems."})
    samples: int = field(default=1, metadata={"help": "Answers k a problem."})
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest answer (verbal: CoT and answer)."})
    trace_temperature: float = field(default=0.0, metadata={"help": "Temperature of the trace; 0 is greedy."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the answer; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Of the answer: the likeliest tokens of this share."})
    top_k: int = field(default=0, metadata={"help": "Of the answer: so many of the likeliest tokens; 0 is all."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling, of the swaps and of the bootstrap."})
    pause_tokens: int | None = field(
        default=None, metadata={"help": "Answer after so many copies of the first codebook token, not after a trace."}
    )
    answer_stub: str | None = field(default=None, metadata={"help": "What a swapped verbal CoT is answered from."})
    part_answers: int = field(default=256, metadata={"help": "Answers between two savings of the work done."})

    def __post_init__(self):
        super().__post_init__()
        if (self.engine or {}).get("data_parallel_size", 1) > 1:
            raise Refused("engine: data_parallel_size is for `abscot traces`; evaluate with backend: server")
        lowest = {"limit": 1, "max_new_tokens": 1, "seed": 0, "samples": 1, "top_k": 0, "part_answers": 1}
        for name, low in (lowest | {"pause_tokens": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise Refused(f"{name} must be at least {low}, got {value}")
        if not all(0 <= value < math.inf for value in (self.trace_temperature, self.temperature)):
            raise Refused(
                f"temperatures must be finite and not negative, got {self.trace_temperature} and {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise Refused(f"top_p must lie in 0 < top_p <= 1, got {self.top_p}")
        self._check_modes()
        if all(self.samples_of(mode) < self.samples for mode in self.modes):
            traced = "abstract" in self.modes and not self.pause_tokens
            remedy = "trace_temperature or temperature" if traced else "temperature"
            raise Refused(f"samples: {self.samples} answers at temperature 0 are one and the same; raise {remedy}")

    def _check_modes(self) -> None:
        if not self.modes or self.swaps == []:
            raise Refused("modes and swaps must name at least one each")
        for mode in self.modes:
            if mode not in MODES:
                raise Refused(f"modes: {mode!r} is not one of {', '.join(MODES)}")
        for name, values in (("modes", self.modes), ("swaps", self.swaps or [])):
            if len(set(values)) < len(values):
                raise Refused(f"{name}: {values} names one of them twice")
        for swap in self.swaps or []:
            check_swap(swap)
            if not any(applies(swap, mode) for mode in self.modes):
                raise Refused(
                    f"swaps: none of the modes {', '.join(self.modes)} has a {swap!r}; add abstract, or name others"
                )
        if self.swaps and "own" not in self.swaps:
            raise Refused(f"swaps: the others are compared with 'own'; name it beside {', '.join(self.swaps)}")
        if self.pause_tokens and ("abstract" not in self.modes or self.swaps_of("abstract") != ["own"]):
            raise Refused("pause_tokens takes the place of the trace: modes must hold abstract, and swaps only own")

    def swaps_of(self, mode: str) -> list[str]:
        """What to answer after in `mode`: own first, the others compare with it."""
        if self.swaps is None:
            swaps = ["random", "shuffled", "other", "none"] if mode == "abstract" and not self.pause_tokens else []
        else:
            swaps = [swap for swap in self.swaps if swap != "own" and applies(swap, mode)]
        return ["own", *swaps]

    def samples_of(self, mode: str) -> int:
        """Answers a problem in `mode`: one where nothing is drawn."""
        traces = mode == "abstract" and self.trace_temperature > 0 and not self.pause_tokens
        return self.samples if self.temperature > 0 or traces else 1

    def decoding(self) -> dict:
        """How the answers were made, for `results.json`."""
        names = ("backend", "trace_temperature", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class HarnessArguments(SamplerArguments):
    """
    The model's arguments in lm_eval and lighteval, beside those of [`SamplerArguments`].

    Args:
        pretrained (`str`): folder of an extended checkpoint.
        swap (`str`): what to answer after, one of abstract mode's in `swaps.py`; `other` stays within a task.
        instruction (`str`): whose instruction of `abscot evaluate` follows the last user message: `maths`, `gpqa` or
            `hotpotqa`; `none` leaves the task's prompt alone.
        trace_temperature (`float`): 0 is greedy. The answer's temperature is the task's.
        max_gen_toks (`int`): longest answer, without its trace, where the task names none.
        seed (`int`): of sampling and of the swaps.
    """

    pretrained: str
    swap: str = "own"
    instruction: str = "none"
    trace_temperature: float = 0.0
    max_gen_toks: int = 256
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_swap(self.swap)
        if self.instruction not in ("none", MATHS, GPQA, HOTPOTQA):
            raise Refused(f"instruction {self.instruction!r} is not one of none, {MATHS}, {GPQA}, {HOTPOTQA}")

    @classmethod
    def of(cls, given: dict) -> "HarnessArguments":
        """
        Raises:
            Refused: a name that is no field, or no `pretrained`.
        """
        names = [each.name for each in fields(cls)]
        wrong = [f"{name!r} is unknown" for name in given if name not in names]
        wrong += [] if "pretrained" in given else ["pretrained=FOLDER is missing"]
        if wrong:
            raise Refused(f"the model's arguments: {wrong[0]}; there are {', '.join(names)}")
        return cls(**given)
