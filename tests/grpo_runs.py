"""GRPO of a tiny model in this process; a slow reference of its log-probabilities; a warm start to improve on."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset
from tiny import make_checkpoint
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from abscot_trl.checkpoint import save_checkpoint
from abscot_trl.data.toy import chain_arithmetic, write_problems
from abscot_trl.examples import IGNORE, answer_ids, prompt_ids
from abscot_trl.phases import run_phase
from abscot_trl.training.grpo import AbstractGRPOTrainer
from abscot_trl.training.grpo_config import AbstractGRPOConfig
from abscot_trl.vocabulary import AbstractVocabulary

RECIPE = {"dtype": "float32", "num_generations": 4, "max_completion_length": 16, "instruction": False}
RECIPE |= {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "bf16": False, "use_cpu": True}
RECIPE |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "probe_rows": 4}
RECIPE |= {"rewards": ["accuracy", "trace_length"], "gradient_checkpointing": False, "lr_scheduler_type": "constant"}


def recipe(folder: Path, **fields) -> str:
    """A recipe of `abscot grpo`, with its prompts beside it."""
    prompts = write_problems(folder / "prompts.jsonl", chain_arithmetic(24, 3, 5, seed=1))
    path = folder / "grpo.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"prompts": [prompts]} | fields))
    return str(path)


def run(checkpoint, folder: Path, output: Path, *arguments: str, **fields) -> dict:
    """`abscot grpo` by that recipe, in this process."""
    given = [
        "--config",
        recipe(folder, **fields),
        "--model_name_or_path",
        str(checkpoint),
        "--output_dir",
        str(output),
    ]
    return run_phase("grpo", [*given, *arguments])


def columns(examples) -> Dataset:
    names = {name: [getattr(e, name) for e in examples] for name in ("prompt", "gold", "source", "id")}
    return Dataset.from_dict(names)


def data(n: int = 24) -> Dataset:
    return columns([e for steps in (2, 4, 8) for e in chain_arithmetic(-(-n // 3), steps, 5, seed=0)][:n])


def some(completion_ids, **_) -> list[float]:
    """A reward with variance in every group."""
    return [float(sum(ids) % 5) for ids in completion_ids]


def right(completions, gold, **_) -> list[float]:
    """1 where the answer's text ends in the gold."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(text.endswith(f"{{{g}}}")) for text, g in zip(texts, gold, strict=True)]


def grpo(
    checkpoint, folder, trainer=AbstractGRPOTrainer, rows=None, probes="8", peft_config=None, train=True, **fields
):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": 16,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    rows = data() if rows is None else rows
    probes = data(8) if isinstance(probes, str) else probes
    reward = right if rows.num_rows > 100 else some
    args = AbstractGRPOConfig(**defaults | fields)
    built = trainer(str(checkpoint), [reward], args, rows, probes=probes, peft_config=peft_config)
    if train:
        built.train()
    return built


def loglikelihoods(model, rollouts, policy, temperature) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Of each (prompt, completion), a token at a time from whole logits: log-probabilities, and the entropy there.
    """
    rows = [torch.tensor([*prompt, *completion]) for prompt, completion in rollouts]
    with torch.no_grad():
        logits = model(pad_sequence(rows, True)).logits  # causal: what comes after changes nothing
    return [
        _likelihood(scores[len(prompt) - 1 :], completion, policy, temperature)
        for scores, (prompt, completion) in zip(logits, rollouts, strict=True)
    ]


def _likelihood(logits, completion, policy, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    *codebook, end = policy.allowed
    logps, entropies, written, ended = [], [], 0, False
    for scores, token in zip(logits, completion, strict=False):
        if ended:
            choices, heat = [i for i in range(len(scores)) if i not in policy.barred], temperature
        else:
            choices = [end] if written == policy.m_max else codebook if written < policy.m_min else [*codebook, end]
            heat = policy.temperature
        chances = torch.softmax(scores[choices] / heat, 0).tolist()
        logps.append(math.log(chances[choices.index(token)]))
        entropies.append(-sum(p * math.log(p) for p in chances if p))
        written, ended = written + 1, ended or token == end
    return torch.tensor(logps, dtype=torch.float64), torch.tensor(entropies, dtype=torch.float64)


def reports_logps():
    """As with vLLM: the sampler reports log-probabilities (here the slow reference's), and trl corrects by them."""

    class Reporting(AbstractGRPOTrainer):
        def _generate_single_turn(self, prompts, *args, **kwargs):
            self.use_vllm = False
            ids, _ = super()._generate_single_turn(prompts, *args, **kwargs)
            self.use_vllm = self._probing is None
            if self._probing:
                return ids, None
            rollouts = list(zip(prompts, ids, strict=True))
            found = loglikelihoods(self.model, rollouts, self.trace_policy, self.temperature)
            return ids, [logps.tolist() for logps, _ in found]

        def probe(self):
            self.use_vllm = False
            super().probe()

    return Reporting


def started(folder: Path) -> tuple[Path, Dataset]:
    """
    Is the first number odd? A model that answers by the first code of its trace (the upper half means 1), was never
    taught to write one, and so is right half the time; A holds about half of the mass where a trace is written.
    """
    examples = [replace(e, gold=str(int(e.prompt[0]["content"][0]) % 2)) for e in chain_arithmetic(128, 2, 5, seed=1)]
    if folder.exists():
        return folder, columns(examples)
    make_checkpoint(folder)
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(folder), AbstractVocabulary.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    begin, end, codebook = vocabulary.begin_id(tokenizer), vocabulary.end_id(tokenizer), vocabulary.ids(tokenizer)
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(150):
        ids, labels = [], []
        for i in rng.choice(len(examples), 32, replace=False):
            trace = rng.integers(8, size=rng.integers(1, 7)).tolist()
            head = [*prompt_ids(examples[i].prompt, tokenizer), begin, *(codebook[code] for code in trace), end]
            answer = answer_ids(f"\\boxed{{{trace[0] // 4}}}", tokenizer)
            ids.append(torch.tensor(head + answer))
            labels.append(torch.tensor([IGNORE] * len(head) + answer))
        ids, labels = (pad_sequence(rows, True, value) for rows, value in ((ids, 0), (labels, IGNORE)))
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(model, tokenizer, vocabulary, folder)
    return folder, columns(examples)
