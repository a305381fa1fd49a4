"""Fields of the SFT phases beyond trl's own."""

from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig

from abscot_trl.attention import IMPLEMENTATIONS
from abscot_trl.errors import Refused
from abscot_trl.training.steps import GAUGE_ROWS, accumulation_of, check_recipe

# The baselines by the mode in which each answers.
BASELINES = {
    "sft": "direct",
    "cot": "verbal",
    "pause": "abstract",
    "icot": "direct",
    "cut-cot": "verbal",
    "concise": "verbal",
}


def check_resume(resume: bool) -> None:
    if not isinstance(resume, bool):
        raise Refused(
            f"resume_from_checkpoint: {resume!r} is neither true nor false; true finds the last checkpoint in "
            "output_dir by itself"
        )


@dataclass
class BottleneckConfig(SFTConfig):
    """
    Configuration of [`BottleneckSFTTrainer`]: trl's `SFTConfig` and the fields below.

    `max_length` is the longest row (and the length of a packed one); rows are never cut. `packing` packs whole
    documents, best fit first, under the same mask; trl's own packing is not used. On flex attention packed rows are
    padded to `max_length`, so that kernels are compiled once.

    Args:
        channel (`str`, *optional*, defaults to `"hidden"`):
            What y may read of the trace: `"hidden"`, its hidden states (the paper's single masked pass), or
            `"discrete"`, only what the tokens themselves say.
        supervise_end (`bool`, *optional*, defaults to `True`):
            Train on `<endabstract>`. Eq. 3 to the letter does not, and then stopping is never learnt.
        global_batch_size (`int`, *optional*):
            Rows (packed rows with `packing`) of one optimiser step over all processes; sets
            `gradient_accumulation_steps`, so that one recipe takes the same steps on any number of GPUs.
        resume_from_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether a killed phase goes on from the last sealed checkpoint in `output_dir`.
        overlong (`str`, *optional*, defaults to `"error"`):
            Rows longer than `max_length`: `"error"` refuses to start, `"drop"` leaves them out and counts them.
        compile_layers (`bool`, *optional*, defaults to `False`):
            Compile the decoder layers, one graph for all; the first step takes half a minute. Not `torch_compile`,
            which takes the whole model at once and far longer.
        flex_kernels (`str`, *optional*, defaults to `"triton"`):
            Kernels of flex attention, for packed rows: `"flash"` are flash-attn-4's (`pip install -e '.[flash]'`), for
            Hopper cards and newer: a step at 8192 tokens takes 0.88 of the time (recipes/SPEED.md).
        gauge_rows (`int`, *optional*, defaults to `64`):
            Rows held out of training, on which the gauges are read (`training/gauges.py`): do traces carry, and can
            they be written? None are, and no gauge is, of fewer than 50 times as many rows; `0` turns gauges off.
        gauge_steps (`int`, *optional*, defaults to `200`):
            Gauges are read after so many steps, whenever these have doubled, and at the end.
    """

    max_length: int | None = field(
        default=8192, metadata={"help": "Longest row in tokens, trace included; also the length of a packed row."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=128, metadata={"help": "Rows are padded to a multiple of this; flex attention needs 128."}
    )
    channel: str = field(
        default="hidden",
        metadata={
            "help": "'hidden': y reads the trace's hidden states (the paper); 'discrete': only its tokens.",
            "choices": ["hidden", "discrete"],
        },
    )
    supervise_end: bool = field(default=True, metadata={"help": "Train on <endabstract> (eq. 3 to the letter: no)."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of a step over all processes; sets gradient_accumulation_steps."}
    )
    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Not added by this loss; 0 keeps trl from asking a dense Granite for it."}
    )
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "Go on from the last whole checkpoint in output_dir, if there is one."}
    )
    overlong: str = field(
        default="error",
        metadata={"help": "Rows longer than max_length: refuse to start, or drop them.", "choices": ["error", "drop"]},
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "Compile the decoder layers (one graph, half a minute at the start)."}
    )

    flex_kernels: str = field(
        default="triton",
        metadata={"help": "Kernels of flex attention; flash: flash-attn-4's.", "choices": ["triton", "flash"]},
    )
    gauge_rows: int = field(
        default=GAUGE_ROWS, metadata={"help": "Held-out rows that gauges are read on, of 50 times as many; 0: none."}
    )
    gauge_steps: int = field(
        default=200, metadata={"help": "First step that gauges are read after; then at each doubling, and at the end."}
    )

    def __post_init__(self):
        check_recipe(vars(self))
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # one process, one card: transformers would use nn.DataParallel over all
        self.gradient_accumulation_steps = accumulation_of(vars(self), self.world_size)
        check_resume(self.resume_from_checkpoint)
        if self.max_length is None or not self.pad_to_multiple_of:
            raise Refused("max_length and pad_to_multiple_of need a number here (set pad_to_multiple_of: 1 for none)")
        if self.loss_type != "nll" or self.label_smoothing_factor or self.eval_strategy != "no":
            raise Refused("loss_type, label_smoothing_factor and eval_strategy have no effect here; leave them out")


@dataclass
class DistillationConfig(BottleneckConfig):
    """
    Configuration of [`SelfDistillationTrainer`].

    Args:
        rehearsal (`float`, *optional*, defaults to `0.0`):
            Loss weight of the masked row [x; c; z~; y] trained beside each [x; z~; y]; keeps the policy given (x, c)
            alive for the next round. `0` leaves it out, as the paper does.
    """

    rehearsal: float = field(
        default=0.0, metadata={"help": "Loss weight of the masked row of the same example; 0 leaves it out."}
    )


@dataclass
class BaselineConfig(BottleneckConfig):
    """
    Configuration of [`BaselineTrainer`].

    Args:
        baseline (`str`, *optional*, defaults to `"sft"`):
            What is trained, see [`BaselineTrainer`]: `sft`, `cot`, `pause`, `icot`, `cut-cot` or `concise`.
        pause_tokens (`int`, *optional*):
            `pause`: how many pause tokens; m_max when left out.
        removed_after (`float`, *optional*, defaults to `0.8`):
            `icot`: share of the steps after which nothing of the longest CoT is left.
        removal_stages (`int`, *optional*):
            `icot`: in how many portions it goes; when left out, token by token, as in the paper. Long CoTs need it:
            AdamW's moments are forgotten at each.
        removal_smoothing (`float`, *optional*, defaults to `4.0`):
            `icot`: lambda of the extra tokens o that a row loses, P(o) ~ exp(-lambda o).
    """

    baseline: str = field(default="sft", metadata={"help": "What is trained.", "choices": list(BASELINES)})
    pause_tokens: int | None = field(default=None, metadata={"help": "pause: how many; m_max when left out."})
    removed_after: float = field(default=0.8, metadata={"help": "icot: share of steps after which no CoT is left."})
    removal_stages: int | None = field(default=None, metadata={"help": "icot: portions; none: token by token."})
    removal_smoothing: float = field(default=4.0, metadata={"help": "icot: lambda of the random extra removal."})

    def __post_init__(self):
        super().__post_init__()
        if self.baseline not in BASELINES:
            raise Refused(f"baseline: {self.baseline!r} is not one of {', '.join(BASELINES)}")
        if self.baseline == "icot" and self.packing:
            raise Refused("baseline: icot removes tokens step by step, packed rows are fixed; set packing: false")
        if not 0 < self.removed_after <= 1 or self.removal_smoothing <= 0:
            raise Refused(
                f"removed_after {self.removed_after} must be a share over 0, removal_smoothing "
                f"{self.removal_smoothing} over 0"
            )
        for name in ("pause_tokens", "removal_stages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")


def _check_flash(attention: str | None, packing: bool) -> None:
    """Whether flash-attn-4 can run flex attention here; torch would say so after the model is loaded."""
    if attention != "flex_attention" or not packing:
        raise Refused("flex_kernels: flash is for attn_implementation: flex_attention and packing: true")
    if not find_spec("flash_attn") or not find_spec("flash_attn.cute"):
        raise Refused("flex_kernels: flash needs flash-attn-4; pip install -e '.[flash]', or take triton")
    if torch.cuda.get_device_capability()[0] < 9:
        raise Refused("flex_kernels: flash needs a Hopper card (H100, H200) or a newer one; take triton")


def _check_mask(training_args: BottleneckConfig, attention: str | None) -> None:
    """Whether the attention implementation and its kernels can carry the mask."""
    if attention not in (None, *IMPLEMENTATIONS):
        raise Refused(f"attn_implementation {attention!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if attention == "flex_attention" and training_args.device.type == "cpu":
        raise Refused("attn_implementation flex_attention trains on a GPU only; take sdpa on CPU")
    if training_args.flex_kernels == "flash":
        _check_flash(attention, training_args.packing)
    if training_args.compile_layers and is_deepspeed_zero3_enabled():
        raise Refused(
            "compile_layers does not go with DeepSpeed ZeRO-3, which gathers weights inside of a layer; "
            "set use_liger_kernel: true instead, or train on the single, ddp, zero2 or fsdp2 configuration"
        )


def check_settings(training_args: TrainingArguments, model_args: ModelConfig) -> None:
    """
    What the libraries would say later, or never.

    Raises:
        Refused: an attention implementation that carries no mask (of the SFT phases), a `report_to` that is not
            installed, a field of trl's that has no effect here, or compiled layers under ZeRO-3.
    """
    if isinstance(training_args, BottleneckConfig):
        _check_mask(training_args, model_args.attn_implementation)
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name):
            raise Refused(f"{name} has no effect here; leave it out")
    at_least = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    for name, least in at_least.items():
        if getattr(training_args, name) < least:
            raise Refused(f"{name} must be at least {least}, got {getattr(training_args, name)}")
    if training_args.optim_args and not all("=" in part for part in training_args.optim_args.split(",")):
        raise Refused(f"optim_args: {training_args.optim_args!r} is not of the form name=value,name=value")
    for name in ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
        if isinstance(getattr(training_args, name), str):
            raise Refused(f"{name}: {getattr(training_args, name)!r} is no JSON object")
    args = training_args
    try:
        betas = (args.adam_beta1, args.adam_beta2)
        adam = torch.optim.AdamW([torch.zeros(1)], args.learning_rate, betas, args.adam_epsilon, args.weight_decay)
        get_scheduler(args.lr_scheduler_type, adam, 1, 2, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise Refused(f"learning_rate, adam_*, weight_decay, lr_scheduler_*: {error}") from error
    there = get_available_reporting_integrations()
    missing = [name for name in training_args.report_to if name not in there]
    if missing:
        raise Refused(f"report_to: {', '.join(missing)} is not installed; {', '.join(there) or 'none'} is")


def built(trainer_class: type, **arguments):
    """
    A trainer.

    Raises:
        Refused: trl, peft or transformers do not take the recipe's values, or the weights are of another shape.
    """
    try:
        return trainer_class(**arguments)
    except Refused:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatch" not in str(error):  # a GPU's memory, for one
            raise
        raise Refused(f"{arguments['model']}: the trainer refuses it or its settings: {error}") from error
