"""Which rewards a run is trained on: the fields, and the functions that they name."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from abscot_trl.errors import Refused
from abscot_trl.rewards.accuracy import accuracy
from abscot_trl.rewards.judge import Judge
from abscot_trl.rewards.lengths import answer_length, trace_length

NAMES = ("accuracy", "judge", "answer_length", "trace_length")


@dataclass
class RewardArguments:
    """
    Rewards by name, in trl's own form: any reward function written for trl works here. Their weights are trl's field
    `reward_weights`.

    Args:
        rewards (`list[str]`, *optional*, defaults to `["accuracy"]`): any of `accuracy`, `judge`, `answer_length`,
            `trace_length`, and functions of yours as `package.module:function`.
        judge_url (`str`, *optional*): an OpenAI-compatible API, as `http://localhost:8000/v1`; `OPENAI_API_KEY` of the
            environment is sent to it.
        judge_model (`str`, *optional*): the model that it serves.
        judge_requests (`int`, *optional*, defaults to `32`): requests at once, of each training process.
        judge_timeout (`float`, *optional*, defaults to `120.0`): seconds for one request.
        judge_retries (`int`, *optional*, defaults to `5`): further tries after 1, 2, 4, .. s, or what the judge says.
        judge_cache (`str`, *optional*): folder of the verdicts; several processes and runs may share it.
        judge_max_outages (`float`, *optional*, defaults to `0.2`): the share of a step's answers that may go without a
            score; with more the run stops.
        judge_effort (`str`, *optional*): the judge's `reasoning_effort`.
        answer_budget (`int`, *optional*): the tokens at which `answer_length` is -1; by default the longest answer's.
    """

    rewards: list[str] = field(
        default_factory=lambda: ["accuracy"],
        metadata={"help": "Any of accuracy, judge, answer_length, trace_length, package.module:function."},
    )
    judge_url: str | None = field(default=None, metadata={"help": "The judge's API: http://host:port/v1."})
    judge_model: str | None = field(default=None, metadata={"help": "The model that the judge serves."})
    judge_requests: int = field(default=32, metadata={"help": "Requests to the judge at once, a process."})
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds for one request to the judge."})
    judge_retries: int = field(default=5, metadata={"help": "Further tries of a request that failed."})
    judge_cache: str | None = field(default=None, metadata={"help": "Folder in which verdicts are kept."})
    judge_max_outages: float = field(
        default=0.2, metadata={"help": "Share of a step's answers that may go without a score."}
    )
    judge_effort: str | None = field(default=None, metadata={"help": "reasoning_effort of the judge (medium)."})
    answer_budget: int | None = field(default=None, metadata={"help": "Tokens at which answer_length is -1."})

    def __post_init__(self):
        if not self.rewards or len(set(self.rewards)) < len(self.rewards):
            raise Refused(f"rewards: {self.rewards} must name one or more, each once")
        for name in self.rewards:
            if name not in NAMES and not all(name.partition(":")[::2]):
                raise Refused(f"rewards: {name!r} is none of {', '.join(NAMES)}, and no package.module:function")
        if "judge" in self.rewards and not (self.judge_url and self.judge_model):
            raise Refused("rewards: judge needs judge_url (http://host:port/v1) and judge_model (what it serves)")
        if self.judge_url and not self.judge_url.startswith(("http://", "https://")):
            raise Refused(f"judge_url: {self.judge_url!r} is no http://host:port/v1")
        for name, low in {"judge_requests": 1, "judge_retries": 0, "answer_budget": 1}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise Refused(f"{name} must be at least {low}, got {value}")
        if not 0 < self.judge_timeout < math.inf:
            raise Refused(f"judge_timeout must be finite and over 0 s, got {self.judge_timeout}")
        if not 0 <= self.judge_max_outages < 1:
            raise Refused(f"judge_max_outages must lie in 0 <= share < 1, got {self.judge_max_outages}")


def reward_functions(args: RewardArguments, end_id: int, m_max: int, max_answer: int) -> list[Callable]:
    """
    The functions of `args.rewards`, in their order, for trl's `reward_funcs`.

    Args:
        end_id (`int`): the token that ends a trace.
        m_max (`int`): tokens of the longest trace.
        max_answer (`int`): tokens of the longest answer.

    Raises:
        Refused: a function of the user's that is not to be had; a folder that can be no `judge_cache`.
    """
    ours = {
        "accuracy": lambda: accuracy,
        "judge": lambda: _judge(args),
        "answer_length": lambda: partial(answer_length, end_id, args.answer_budget or max_answer),
        "trace_length": lambda: partial(trace_length, end_id, m_max),
    }
    return [ours[name]() if name in ours else _imported(name) for name in args.rewards]


def _judge(args: RewardArguments) -> Judge:
    names = ("url", "model", "requests", "timeout", "retries", "max_outages", "effort", "cache")
    return Judge(**{name: getattr(args, f"judge_{name}") for name in names})


def _imported(path: str) -> Callable:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise Refused(f"rewards: {path!r} cannot be imported ({error}); see that PYTHONPATH has its folder") from error
    if not callable(found):
        raise Refused(f"rewards: {path!r} is {found!r:.80}, no function; name one of {module}")
    return found
