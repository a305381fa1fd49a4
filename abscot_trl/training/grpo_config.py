"""Fields of GRPO beyond trl's own."""

import math
import os
from dataclasses import dataclass, field

from trl import GRPOConfig

from abscot_trl.errors import Refused
from abscot_trl.training.configs import check_resume
from abscot_trl.training.steps import accumulation_of, check_recipe


@dataclass
class AbstractGRPOConfig(GRPOConfig):
    """
    Configuration of [`AbstractGRPOTrainer`]: trl's `GRPOConfig` and the fields below.

    `max_completion_length` counts the trace, its end delimiter and the answer. `temperature` is that of the answer,
    and of the trace too unless `trace_temperature` is set: each is drawn and scored at its own, so that they may
    differ. `top_p`, `top_k` and `min_p` stay off: no log-probability of ours would be the sampler's.

    Args:
        train_on (`str`, *optional*, defaults to `"both"`):
            Whose log-probabilities eq. 5 trains: `"both"`, `"trace"` or `"answer"`. The KL goes with them.
        trace_temperature (`float`, *optional*):
            Temperature of the trace's draws.
        beta (`float`, *optional*, defaults to `0.04`):
            Weight of the KL to the warm start, of the GRPO paper (arXiv:2402.03300); trl's default has none.
        global_batch_size (`int`, *optional*):
            Completions of one optimiser step over all processes; sets `gradient_accumulation_steps`.
        probe_rows (`int`, *optional*, defaults to `64`):
            Prompts with a gold that are held out of training, on which accuracy after the own and after a random
            trace is measured; `0` for none.
        probe_steps (`int`, *optional*, defaults to `50`):
            It is measured before the first step, after each so many, and at the end.
        resume_from_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether a killed phase goes on from the last sealed checkpoint in `output_dir`.
    """

    beta: float = field(default=0.04, metadata={"help": "Weight of the KL to the warm start."})
    train_on: str = field(
        default="both",
        metadata={"help": "Whose log-probabilities are trained.", "choices": ["both", "trace", "answer"]},
    )
    trace_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the trace's draws; none: `temperature`, as of the answer."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Completions of a step over all processes; sets gradient_accumulation_steps."}
    )
    probe_rows: int = field(default=64, metadata={"help": "Held-out prompts with a gold for the probe; 0: none."})
    probe_steps: int = field(default=50, metadata={"help": "Steps from one probe to the next."})
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "Go on from the last whole checkpoint in output_dir, if there is one."}
    )

    def __post_init__(self):
        check_recipe(vars(self))
        self.gradient_accumulation_steps = accumulation_of(vars(self), int(os.environ.get("WORLD_SIZE", "1")))
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one process, one card: transformers would use nn.DataParallel over all
        check_resume(self.resume_from_checkpoint)
        if self.eval_strategy != "no" or self.log_completions or self.use_transformers_continuous_batching:
            raise Refused(
                "eval_strategy, log_completions and use_transformers_continuous_batching have no effect here: the "
                "probe, the log's rollouts and use_vllm are there; leave them out"
            )
        for name in ("chat_template_kwargs", "generation_kwargs", "cache_implementation", "num_generations_eval"):
            if getattr(self, name) is not None:
                raise Refused(f"{name} has no effect here; leave it out")
        if self.sync_ref_model:
            raise Refused("sync_ref_model: the reference is the warm start (eq. 5), and a moved one is not saved")
        for name, neutral in {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}.items():
            if getattr(self, name) != neutral:
                raise Refused(
                    f"{name}: {getattr(self, name)} changes what is sampled, and the trainer's log-probabilities know "
                    "the trace constraint and the temperatures only; leave it out"
                )
        for name in ("temperature", "trace_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise Refused(f"{name} must be over 0 and finite, got {value}: greedy rollouts of a group are all one")
        if self.probe_rows < 0 or self.probe_steps < 1:
            raise Refused(f"probe_rows {self.probe_rows} must be 0 or more, probe_steps {self.probe_steps} 1 or more")
        period = self.steps_per_generation * self.num_iterations  # micro-batches that one generation serves
        if self.save_strategy != "no" and period % self.gradient_accumulation_steps:
            raise Refused(
                f"steps_per_generation {self.steps_per_generation} x num_iterations {self.num_iterations} must be a "
                f"multiple of the {self.gradient_accumulation_steps} micro-batches of a step, or checkpoints would "
                'lie within a generation; set save_strategy: "no" to do without'
            )
        if self.save_strategy == "steps" and (self.save_steps * self.gradient_accumulation_steps) % period:
            raise Refused(
                f"save_steps {self.save_steps}: the rollouts of one generation serve "
                f"{period / self.gradient_accumulation_steps:g} steps and are not saved; a multiple of that is "
                "needed, or a resumed run would draw others"
            )
