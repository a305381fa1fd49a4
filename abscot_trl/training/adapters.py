"""LoRA with trained token rows: the 66 new rows and no other of the embedding matrix."""

import os

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config

from abscot_trl.checkpoint import load_config
from abscot_trl.errors import Refused


def lora_config(model_args: ModelConfig, token_ids: list[int]) -> LoraConfig | None:
    """
    trl's LoRA configuration plus `trainable_token_indices` for the abstract tokens; `None` for full fine-tuning.

    A tied head follows the embedding by itself (peft); an untied one gets rows of its own.

    Raises:
        Refused: under ZeRO-3 or FSDP, which cannot train single embedding rows; or `lora_modules_to_save` names an
            embedding matrix, which would train all 152k rows and silently untie the head.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    if is_deepspeed_zero3_enabled():
        raise Refused(
            "LoRA with trained token rows does not work under DeepSpeed ZeRO-3. Use the single, ddp or zero2 "
            "configuration with LoRA, or zero3 with full fine-tuning (use_peft: false)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise Refused(
            "LoRA with trained token rows is not supported under FSDP. Use the single, ddp or zero2 configuration "
            "with LoRA, or fsdp2 with full fine-tuning (use_peft: false)"
        )
    whole = {"embed_tokens", "lm_head"} & set(config.modules_to_save or [])
    if whole:
        raise Refused(
            f"lora_modules_to_save: {sorted(whole)} would train and save whole matrices and untie the head; "
            "leave it out, the abstract tokens' rows are trained anyway"
        )
    config.trainable_token_indices = {"embed_tokens": token_ids}
    if not load_config(model_args.model_name_or_path).tie_word_embeddings:
        config.trainable_token_indices["lm_head"] = token_ids
    return config


def mend_output_head(model: nn.Module) -> None:
    """Give peft's token-row wrapper the `bias` that trl 1.16's fused head reads (add_fused_lm_head)."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)


def keep_inputs_narrow(model: nn.Module) -> None:
    """
    Leave out peft's cast of LoRA inputs to float32, which autocast would undo at once: same gradients, less traffic.

    The model must then be called under autocast, as `Trainer` does with `bf16: true`.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
