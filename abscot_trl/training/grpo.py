"""
Stage 2, GRPO over trace and answer (eq. 5), as a trl GRPOTrainer.

    z~_k ~ pi_abs(. | x), y_k ~ pi(. | x, z~_k);    A_k = (R_k - mean R) / (std R + eps)

with the clipped ratios of log pi_abs on z~ and of log pi on y (`training/policy.py`), and their KL to the warm start.
"""

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import RepeatSampler

from abscot_trl.errors import Refused
from abscot_trl.examples import prompt_ids
from abscot_trl.rewards.accuracy import accuracy
from abscot_trl.traces.hf import HFTraceSampler
from abscot_trl.traces.rollout import AbstractVLLMGeneration, check_room, trace_and_answer
from abscot_trl.traces.vllm import row_seed
from abscot_trl.training.adapters import keep_inputs_narrow, mend_output_head
from abscot_trl.training.grpo_config import AbstractGRPOConfig
from abscot_trl.training.policy import TracePolicy, renormalise_traces
from abscot_trl.training.resume import SealCheckpoints, SealedTrainer
from abscot_trl.training.times import TimedGRPOTrainer
from abscot_trl.vocabulary import AbstractVocabulary

SHOWN, LETTERS = 4, 2000  # rollouts kept with each logged step, and how much of their text
ALIKE = 1e-6  # rewards of a group that lie within this teach nothing


class EpochSampler(RepeatSampler):
    """trl's, with an order for each epoch that a resumed run finds again."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class Probe(TrainerCallback):
    """Every `probe_steps`, and before the first: does the answer still read the trace?"""

    def __init__(self, trainer: "AbstractGRPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step = state.global_step * args.gradient_accumulation_steps  # trl begins at 0 on resume
        if state.global_step == 0:
            self.trainer.probe()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.probe_steps == 0 or state.global_step == state.max_steps:
            due = control.should_log
            self.trainer.probe()
            control.should_log = due  # its own entry has cleared it


class AbstractGRPOTrainer(SealedTrainer, TimedGRPOTrainer):
    """
    Group relative policy optimisation of [z~; y] under constrained decoding.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            A warm-started, merged checkpoint, or (cold start) one of `abscot init`. It is the reference too.
        reward_funcs (`list[Callable]`): trl's reward functions; they see the answer's text, and all ids.
        args ([`AbstractGRPOConfig`]): trl's fields and this package's.
        train_dataset ([`~datasets.Dataset`]): columns `prompt` (messages), and those that the rewards read.
        vocabulary ([`AbstractVocabulary`], *optional*): read from the checkpoint when left out.
        probes ([`~datasets.Dataset`], *optional*): prompts with `gold`, for `probe`; they are not trained.
        processing_class, peft_config, callbacks: as in `GRPOTrainer`; make `peft_config` with [`lora_config`].

    Beside trl's metrics it logs `trace/length`, `trace/entropy`, `trace/forced_end`, `answer/length`, with vLLM
    `ratio/mean` and `ratio/outside` (of trainer to sampler, a token: its mean, and the share outside [0.9, 1.1]),
    `probe/own`, `probe/random`, and seconds (`time/..`). With each logged step, `log_history` keeps the codebook's
    counts and some rollouts.

    Raises:
        Refused: settings that cannot work together; while it trains, a loss or weights that are not finite.
    """

    _tag_names = ["trl", "grpo", "abstract-cot"]
    _name = "GRPO on abstract traces"

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: list[Callable],
        args: AbstractGRPOConfig,
        train_dataset: Dataset,
        vocabulary: AbstractVocabulary | None = None,
        probes: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        args = copy.copy(args)  # the caller's stays as it is
        path = model if isinstance(model, str) else model.config._name_or_path
        self.vocabulary = vocabulary or AbstractVocabulary.load(path)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(path)
        self.begin, self.end = self.vocabulary.begin_id(tokenizer), self.vocabulary.end_id(tokenizer)
        self.codebook = self.vocabulary.ids(tokenizer)
        check_room(args.max_completion_length, self.vocabulary.m_max)
        if not args.use_vllm and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise Refused(
                "rollouts by transformers would hang under FSDP, whose processes must take the same steps; set "
                "use_vllm: true, or train under zero3"
            )
        if isinstance(model, str):  # trl's own device_map would spread the model over all cards
            args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
        keep, args.save_total_limit = args.save_total_limit, None  # transformers' own would run before the seal
        args.logging_nan_inf_filter = False
        own = partial(
            AbstractVLLMGeneration,
            vocabulary=self.vocabulary,
            trace_temperature=args.trace_temperature,
            seed=args.seed,
        )
        with patch.object(grpo_trainer, "VLLMGeneration", own):  # trl makes it, and has no argument for its class
            super().__init__(model, reward_funcs, args, train_dataset, processing_class=tokenizer, **kwargs)
        mend_output_head(self.model)
        if args.bf16 or args.fp16:
            keep_inputs_narrow(self.model)
        temperature = args.temperature if args.trace_temperature is None else args.trace_temperature
        self.trace_policy = TracePolicy(
            [*self.codebook, self.end],
            self.vocabulary.m_min,
            self.vocabulary.m_max,
            temperature,
            self.vocabulary.all_ids(tokenizer),
        )
        for scored in (self.model, self.ref_model):
            if scored is not None:
                scored = self.accelerator.unwrap_model(scored)
                renormalise_traces(scored.get_base_model() if is_peft_model(scored) else scored, self.trace_policy)
        self.probes, self._probing = probes, None
        self._counts, self._shown = Counter(), []
        self.add_callback(SealCheckpoints(self, keep))
        self.add_callback(Probe(self))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        its = super()._get_train_sampler(dataset)
        self._order = EpochSampler(
            its.data_source, its.mini_repeat_count, its.batch_size, its.repeat_count, its.shuffle, its.seed
        )
        return self._order

    def _run_epoch(self, **kwargs):
        self._order.set_epoch(
            kwargs["epoch"]
        )  # accelerate reaches it through two wrappers, and a resumed run has three
        super()._run_epoch(**kwargs)

    def _tokenize_prompts(self, prompts: list[list[dict[str, str]]]):
        """As everywhere in this package; a rollout begins after `<beginabstract>`."""
        return [[*prompt_ids(messages, self._tokenizer), self.begin] for messages in prompts], None, {}

    def _generate_single_turn(self, prompts, images, multimodal_fields, num_generations, has_tool_images=False):
        """
        [z; <endabstract>; y] after each prompt, and with vLLM their log-probabilities. The number of the call follows
        from the step, so that a resumed run draws what an uninterrupted one does.
        """
        call = self._step // (self.args.steps_per_generation * self.num_iterations)
        if self.use_vllm:
            self.vllm_generation.calls = call
            return super()._generate_single_turn(prompts, images, multimodal_fields, num_generations)
        with (
            profiling_context(self, "transformers.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            return self._rollouts(model, prompts, row_seed(self.args.seed, call)), None

    def _rollouts(self, model: PreTrainedModel, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """z, then y after it, by transformers; rows are numbered over all processes."""
        sampler = HFTraceSampler(model, self._tokenizer, self.vocabulary, batch_tokens=2**62)  # one batch, as trl
        first = self.accelerator.process_index * len(prompts)
        hot = (0.0, 0.0) if self._probing else (self.trace_policy.temperature, self.temperature)
        _, heads, answers = trace_and_answer(
            sampler, prompts, self.vocabulary, self.max_completion_length, hot, seed,
            list(range(first, first + len(prompts))), self._probing == "random",
        )  # fmt: skip
        return [head + ids for head, ids in zip(heads, answers, strict=True)]

    def _calculate_rewards(self, *args, **kwargs) -> Tensor:
        """
        trl's, of all processes, shape (rows, rewards). A reward that some of a group have and others lack (its judge
        did not answer) would count as 0 in their sum: those rows are left out, as if no reward had been given.
        Groups without variance are counted here: by rounding trl's deviation of equal sums can be 6e-8, not 0.
        """
        rewards = super()._calculate_rewards(*args, **kwargs)
        lacking = rewards.isnan().view(-1, self.num_generations, rewards.shape[1])
        missing = lacking & lacking.any(1, keepdim=True) & ~lacking.all(1, keepdim=True)
        rewards[missing.any(2).flatten()] = torch.nan
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        totals = totals.masked_fill(rewards.isnan().all(1), torch.nan).view(-1, self.num_generations)
        spread = totals.nan_to_num(-math.inf).amax(1) - totals.nan_to_num(math.inf).amin(1)
        self._alike = (spread < ALIKE).float().mean().item()
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Tensor]:
        """trl's, with the mask of what is trained, and this package's metrics."""
        output = super()._generate_and_score_completions(inputs)
        ids, present = output["completion_ids"], output["completion_mask"].bool()
        trace = self.trace_policy.positions(ids, present)
        answer, forced = present & ~trace, self.trace_policy.forced(trace)
        trained = {"both": trace | answer, "trace": trace, "answer": answer}[self.args.train_on] & ~forced
        output["tool_mask"] = trained.long()
        self._metrics["train"]["frac_reward_zero_std"][-1] = self._alike
        output["num_items_in_batch"] = self.accelerator.gather(trained.sum()).sum()
        codes = trace & (ids != self.end)
        self._log_means("trace/length", codes.sum(1))
        self._log_means("trace/forced_end", forced.any(1))
        self._log_means("answer/length", answer.sum(1))
        if {"sampling_per_token_logps", "old_per_token_logps"} <= output.keys():
            logps = output["old_per_token_logps"] - output["sampling_per_token_logps"]
            ratio = logps.exp()[present & ~forced & logps.isfinite()]
            self._log_means("ratio/mean", ratio)
            self._log_means("ratio/outside", (ratio < 0.9) | (ratio > 1.1))
        for part in gather_object([Counter(ids[codes].tolist())]):
            self._counts.update(part)
        self._shown = [self._tokenizer.decode(row[where]) for row, where in zip(ids[:SHOWN], codes, strict=False)]
        return output

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """trl's, by the head that `renormalise_traces` has changed; here the traces' entropy is logged."""
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if kwargs.get("compute_entropy"):
            ids, present = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
            trace = self.trace_policy.positions(ids, present)
            self._log_means("trace/entropy", found[1].detach()[trace & ~self.trace_policy.forced(trace)])
        return found

    def _log_means(self, name: str, values: Tensor) -> None:
        """The mean over all processes, which may hold different numbers of them; of nothing, nothing is logged."""
        self._metrics["train"][name].append(self._mean(values))

    def _mean(self, values: Tensor) -> float:
        totals = torch.stack([values.float().sum(), torch.tensor(float(values.numel()), device=values.device)])
        total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        return total / count if count else math.nan

    @contextmanager
    def _greedy(self, trace: str) -> Iterator[None]:
        """Rollouts without chance, after each prompt's `own` trace or a `random` one of its length."""
        self._probing = trace
        try:
            with self.vllm_generation.probing(trace) if self.use_vllm else nullcontext():
                yield
        finally:
            self._probing = None

    def probe(self) -> None:
        """Accuracy on `probes`, in points, greedily, after the own trace and a random one: an entry of the log."""
        if not self.probes:
            return
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        each = len(self.probes) // world  # as many on each process
        rows = self.probes.select(range(rank * each, (rank + 1) * each))
        prompts, _, _ = self._tokenize_prompts(rows["prompt"][:])
        columns = {name: rows[name][:] for name in rows.column_names if name != "prompt"}
        found, start = {}, self._now()
        for trace in ("own", "random"):
            with self._greedy(trace):
                ids, _ = self._generate_single_turn(prompts, None, {}, 1)
            answers = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            scores = accuracy(completions=answers, **columns)
            found[f"probe/{trace}"] = self._mean(100 * torch.tensor(scores, device=self.accelerator.device))
        found["time/probe"] = self._now() - start
        Trainer.log(self, found)  # trl's would take the other figures along

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_loss(logs)
        super().log(logs, start_time)
        if "loss" in logs:
            counts = [self._counts[code] for code in self.codebook]
            self.state.log_history[-1] |= {"codebook_counts": counts, "rollouts": self._some_rollouts()}
            self._counts.clear()
        self._logged_step = self.state.global_step

    def _some_rollouts(self) -> list[dict]:
        """The first ones of the last generation: text, trace, and what each reward gave."""
        logs, rollouts = self._logs, []
        for i, trace in enumerate(self._shown):
            texts = {"prompt": logs["prompt"][i][-1]["content"], "trace": trace}
            texts["answer"] = logs["completion"][i][-1]["content"]
            rewards = {name: None if math.isnan(values[i]) else values[i] for name, values in logs["rewards"].items()}
            rollouts.append({name: text[:LETTERS] for name, text in texts.items()} | {"rewards": rewards})
        return rollouts
