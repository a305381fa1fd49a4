"""`abscot grpo`: its inputs, and how they come to the trainer."""

from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from abscot_trl.data.prompts import PromptArguments, load_prompts
from abscot_trl.errors import Refused
from abscot_trl.rewards.arguments import RewardArguments, reward_functions
from abscot_trl.training.grpo import AbstractGRPOTrainer
from abscot_trl.training.grpo_config import AbstractGRPOConfig
from abscot_trl.training.phase import train_alone
from abscot_trl.vocabulary import AbstractVocabulary

# Measured: 17 passes over 1,636 prompts took SmolLM2-135M's sampled answers to them from 59 to 87 % right, and its
# greedy ones to others from 69.7 to 65.8 (abscot_trl/training/README.md).
OFTEN = ": answers can be learnt by heart, by which other prompts do not gain; watch probe/own, or give more prompts"
NEED_GOLD = {"accuracy", "answer_length", "trace_length"}  # rewards that alone say nothing of a prompt without a gold


@dataclass
class GRPOArguments(RewardArguments, PromptArguments):
    """What answers are sampled to, and what is rewarded: the fields of [`PromptArguments`] and [`RewardArguments`]."""

    def __post_init__(self):
        PromptArguments.__post_init__(self)
        RewardArguments.__post_init__(self)


def rollout_inputs(
    args: GRPOArguments,
    training_args: AbstractGRPOConfig,
    vocabulary: AbstractVocabulary,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """
    The trainer's prompts, probes and rewards, and what became of the rows.

    Raises:
        Refused: as [`load_prompts`] and [`reward_functions`]; fewer prompts than one generation takes.
    """
    prompts, counts = load_prompts(args, tokenizer)
    golden = [i for i, gold in enumerate(prompts["gold"]) if gold is not None]
    probes = min(training_args.probe_rows, len(golden) // 2)
    probes = {*golden[: probes - probes % training_args.world_size]}  # as many on each process
    chosen = golden if set(args.rewards) <= NEED_GOLD else range(len(prompts))  # nothing is held against the others
    rows = prompts.select([i for i in chosen if i not in probes])
    needed = training_args.generation_batch_size // training_args.num_generations
    if len(rows) < needed:
        raise Refused(
            f"prompts: {len(rows)} are left to train on, and one generation takes {needed} (generation_batch_size "
            f"{training_args.generation_batch_size} / num_generations {training_args.num_generations}); give more "
            "prompts or lower the batch"
        )
    if training_args.process_index == 0:
        times = draws(training_args, len(rows))
        print(f"{len(rows)} prompts, each drawn {times:.3g} times" + OFTEN * (times >= 2), flush=True)  # noqa: T201
    m_max = vocabulary.m_max
    room = training_args.max_completion_length - m_max - 1
    return {
        "train_dataset": rows,
        "probes": prompts.select(sorted(probes)) if probes else None,
        "reward_funcs": reward_functions(args, vocabulary.end_id(tokenizer), m_max, room),
        "row_counts": counts
        | {"rows": len(rows), "held_out": len(probes), "without_gold": len(prompts) - len(rows) - len(probes)},
    }


def draws(args: AbstractGRPOConfig, rows: int) -> float:
    """How often each of `rows` prompts is drawn by the end: the last `epoch`, but for prompts that fill no batch."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    scored = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
    return scored / args.num_iterations / args.num_generations / rows


def train_grpo(args: GRPOArguments, training_args: AbstractGRPOConfig, model_args: ModelConfig) -> dict:
    """`abscot grpo`: stage 2 (eq. 5)."""
    return train_alone(AbstractGRPOTrainer, partial(rollout_inputs, args, training_args), training_args, model_args)
