"""
The log-probabilities of a rollout [z~; y], as eq. 5 trains them: log pi_abs on z and its end delimiter, log pi on y,
which holds no reserved token, as in evaluation: a model would write a second trace there, where no text shows it.

trl's log-probabilities are over the whole vocabulary, a sampler's of z over A alone. Each token's ratio then carries
the mass that A holds, and trl's correction drops the samples, without a word (trl#6789).
"""

import functools
import types
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx

from abscot_trl.errors import Refused
from abscot_trl.examples import IGNORE
from abscot_trl.traces.constraint import constrained_logps

OTHER_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier")
FAR = -3e4  # in logits: a probability of 0, and no infinity in any precision


@dataclass(frozen=True)
class TracePolicy:
    """
    pi_abs: what the sampler may write, and how it draws.

    Args:
        allowed (`list[int]`): ids of V_abs and, last, of `<endabstract>`.
        m_min, m_max (`int`): fewest and most codebook tokens; after `m_max` the end is forced.
        temperature (`float`): of the trace's draws.
        barred (`list[int]`): what an answer may not hold: the codebook and both delimiters.
    """

    allowed: list[int]
    m_min: int
    m_max: int
    temperature: float = 1.0
    barred: list[int] = field(default_factory=list)

    def positions(self, ids: Tensor, present: Tensor) -> Tensor:
        """Where a completion holds its trace, the first end delimiter included; all of shape (B, L)."""
        ended = ((ids == self.allowed[-1]) & present).int().cumsum(1)
        return present & ((ended == 0) | ((ended == 1) & (ids == self.allowed[-1])))

    def forced(self, trace: Tensor) -> Tensor:
        """Which of the trace's positions are ends that nobody chose: no gradient, no loss."""
        return trace & (trace.cumsum(1) > self.m_max)

    def logps(self, logits: Tensor, ids: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """
        log pi_abs of tokens, and the entropy of pi_abs where each was drawn.

        Args:
            logits (`Tensor`): over `allowed`, shape (N, M + 1).
            ids (`Tensor`): the tokens, shape (N,), each of `allowed`.
            written (`Tensor`): codebook tokens before each, shape (N,).

        Returns:
            Two tensors of shape (N,) in float32, nats.
        """
        logps = constrained_logps(logits, written, self.m_min, self.m_max, self.temperature)
        chosen = (ids[:, None] == torch.tensor(self.allowed, device=ids.device)).int().argmax(-1, keepdim=True)
        finite = logps.masked_fill(logps == -torch.inf, 0.0)  # 0 x -inf, and its gradient, would not be a number
        return logps.gather(1, chosen)[:, 0], -(logps.exp() * finite).sum(-1)


def renormalise_traces(model: PreTrainedModel, policy: TracePolicy) -> None:
    """
    Let the fused head that trl has added (`add_fused_lm_head`) give log pi_abs and its entropy at a trace's positions,
    and at an answer's those without the reserved tokens, which a bias of the head takes out.

    Whoever asks for log-probabilities (policy, old policy, reference) then gets those of the sampler. It is done
    inside `model.forward`, where ZeRO-3 and FSDP2 gather weights and reduce gradients; the rows of the head that it
    needs are M + 1, and the trace's positions go through the whole head no more.

    Args:
        model ([`~transformers.PreTrainedModel`]): not a peft wrapper; its base model.

    Raises:
        Refused: a model that scales its logits in a way that is not known here, or whose head has a bias.
    """
    config = model.config.get_text_config()
    scales = [name for name in OTHER_SCALES if getattr(config, name, None) not in (None, 1.0)]
    if scales:
        raise Refused(f"{config.model_type}: {scales[0]} changes the logits, and traces are not scored under it")
    divisor, fused = getattr(config, "logits_scaling", None) or 1.0, model.forward
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise Refused(f"{config.model_type}: its output head has a bias, and answers are not scored under it")

    @functools.cache
    def bias_on(device: torch.device) -> Tensor:
        bias = torch.zeros(config.vocab_size, device=device)
        bias[policy.barred] = FAR
        if is_deepspeed_zero3_enabled():  # trl asks for its state, and gathers what is not there
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            bias.ds_status = ZeroParamStatus.AVAILABLE
        return bias

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            return fused(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        ids = labels[:, 1:]
        trace = policy.positions(ids, ids != IGNORE)
        rest = labels.clone()
        rest[:, 1:][trace] = IGNORE
        states = []
        hook = self.base_model.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state[:, :-1]))
        head = self.get_output_embeddings()
        answering = types.SimpleNamespace(weight=head.weight, bias=bias_on(head.weight.device))
        try:
            with patch.object(self, "get_output_embeddings", lambda: answering):
                outputs = fused(*args, fused_lm_head=True, labels=rest, **kwargs)
        finally:
            hook.remove()
        logits = _logits(self, states[0][trace], policy.allowed) / divisor
        logps, entropy = policy.logps(logits, ids[trace], (trace.cumsum(1) - 1)[trace])
        outputs.log_probs = outputs.log_probs.masked_scatter(trace, logps.to(outputs.log_probs.dtype))
        if outputs.entropy is not None:
            outputs.entropy = outputs.entropy.masked_scatter(trace, entropy.to(outputs.entropy.dtype))
        return outputs

    model.forward = types.MethodType(forward, model)


def _logits(model: PreTrainedModel, states: Tensor, ids: list[int]) -> Tensor:
    """Logits of `ids` alone, in float32; states of shape (N, H)."""
    head = model.get_output_embeddings()
    weight = head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight  # FSDP2
    with maybe_gather_lm_head_ctx(weight):  # ZeRO-3
        weight = weight[ids]
    with torch.autocast(states.device.type, enabled=False):
        return states.float() @ weight.float().T
