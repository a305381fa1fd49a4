"""Where the seconds of a GRPO step go."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl import GRPOTrainer


class TimedGRPOTrainer(GRPOTrainer):
    """
    trl's, which also logs the seconds of a step by part, means over the logged steps, on the first process:

    - `time/rollout`: from prompts to ids and text, with vLLM's weights brought up to date;
    - `time/rewards`;
    - `time/scoring`: log-probabilities of rollouts by the reference, and by the policy as it was;
    - `time/update`: forward and backward, with DeepSpeed its optimiser's step too;
    - `time/other`: what else becomes of rollouts: padding, advantages, metrics.

    Together they are trl's `step_time`. On a GPU each part begins and ends by waiting for its kernels: a few waits a
    step and two a micro-batch, where trl waits for its metrics anyway. Goes after [`SealedTrainer`].
    """

    _within = 0.0  # seconds of parts within the one at work

    def __init__(self, *args, **kwargs):
        self._seconds = Counter()
        super().__init__(*args, **kwargs)

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Count the seconds in here as `name`'s, less those of parts within."""
        start, outer, self._within = self._now(), self._within, 0.0
        try:
            yield
        finally:
            whole = self._now() - start
            self._seconds[name] += whole - self._within
            self._within = outer + whole

    def training_step(self, *args, **kwargs):
        with self._part("update"):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args, **kwargs):
        with self._part("other"):
            return super()._prepare_inputs(*args, **kwargs)

    def _generate(self, *args, **kwargs):
        with self._part("rollout"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self._part("rewards"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        with self._part("update" if kwargs.get("compute_entropy") else "scoring"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._logged_step)
            logs |= {f"time/{part}": seconds / steps for part, seconds in self._seconds.items()}
            self._seconds = Counter(dict.fromkeys(self._seconds, 0.0))  # one generation may serve several steps
        super().log(logs, start_time)
