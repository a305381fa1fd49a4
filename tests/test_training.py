"""The trainers on tiny models: which losses, which parameters, and the same result however the batch is cut."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch._dynamo.testing import CompileCounter
from trainers import lora, rows, run, settings, token_ids, weights
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from abscot_trl.checkpoint import MergeArguments, merge_adapter
from abscot_trl.errors import Refused
from abscot_trl.training import configs
from abscot_trl.training.adapters import lora_config
from abscot_trl.training.bottleneck import BottleneckSFTTrainer
from abscot_trl.training.configs import BottleneckConfig, DistillationConfig, check_settings
from abscot_trl.training.distillation import SelfDistillationTrainer
from abscot_trl.vocabulary import AbstractVocabulary


def by_hand(checkpoint, data, cot: bool) -> dict[str, float]:
    """Mean losses by plain transformers: a 4-D mask written out with loops, all logits, row by row."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    *codebook, begin, end = token_ids(checkpoint)
    losses = {"trace": [], "end": [], "answer": []}
    for row in data:
        z = [begin, *(codebook[i] for i in row["trace"]), end]
        c = row["cot_ids"] if cot else []
        ids = row["prompt_ids"] + c + z + row["answer_ids"]
        n, first_c = len(ids), len(row["prompt_ids"])
        first_z, first_y = first_c + len(c), first_c + len(c) + len(z)
        mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min)
        for q in range(n):
            for k in range(q + 1):
                if not (q >= first_y and first_c <= k < first_z):
                    mask[0, 0, q, k] = 0.0
        with torch.no_grad():
            logits = model(torch.tensor([ids]), attention_mask={"full_attention": mask}).logits[0]
        logps = torch.log_softmax(logits, dim=-1)
        losses["trace"] += [-logps[i - 1, ids[i]].item() for i in range(first_z + 1, first_y - 1)]
        losses["end"].append(-logps[first_y - 2, end].item())
        losses["answer"] += [-logps[i - 1, ids[i]].item() for i in range(first_y, n)]
    everything = sum(losses.values(), [])
    return {name: sum(values) / len(values) for name, values in {**losses, "all": everything}.items()}


def test_bottleneck_loss_is_equation_3(checkpoint, tmp_path):
    trainer = run(checkpoint, tmp_path, per_device_train_batch_size=16)
    log, expected = trainer.state.log_history[0], by_hand(checkpoint, rows(checkpoint), cot=True)
    assert abs(log["loss_trace"] - expected["trace"]) < 1e-4
    assert abs(log["loss_end"] - expected["end"]) < 1e-4
    assert abs(log["loss_answer"] - expected["answer"]) < 1e-4
    assert abs(log["loss"] - expected["all"]) < 1e-4
    assert log["loss_trace_uniform"] == pytest.approx(math.log(8))


def test_distillation_loss_is_equation_4(checkpoint, tmp_path):
    trainer = run(checkpoint, tmp_path, SelfDistillationTrainer, per_device_train_batch_size=16)
    log, expected = trainer.state.log_history[0], by_hand(checkpoint, rows(checkpoint), cot=False)
    assert abs(log["loss_trace"] - expected["trace"]) < 1e-4 and abs(log["loss_answer"] - expected["answer"]) < 1e-4


def test_rehearsal_adds_the_masked_rows(checkpoint, tmp_path):
    trainer = run(checkpoint, tmp_path, SelfDistillationTrainer, per_device_train_batch_size=32, rehearsal=0.5)
    log = trainer.state.log_history[0]
    blind, masked = (by_hand(checkpoint, rows(checkpoint), cot=cot) for cot in (False, True))
    assert abs(log["loss_trace"] - blind["trace"]) < 1e-4
    assert abs(log["loss_answer_given_cot"] - masked["answer"]) < 1e-4
    assert abs(log["loss"] - (blind["all"] + 0.5 * masked["all"]) / 2) < 1e-4
    with pytest.raises(ValueError, match="rehearsal"):
        DistillationConfig(**settings(tmp_path, rehearsal=-1.0))


@pytest.mark.parametrize("trainer", [BottleneckSFTTrainer, SelfDistillationTrainer])
def test_every_parameter_moves(checkpoint, tmp_path, trainer):
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    after = run(checkpoint, tmp_path, trainer, max_steps=2).model
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert new.requires_grad and not torch.equal(old, new), name


def test_batch_of_eight_equals_eight_accumulated(checkpoint, tmp_path):
    """Rows of different lengths: only a mean over the step's tokens, not over its micro-batches, agrees."""
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    options = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    one, eight = (run(checkpoint, tmp_path / str(i), **options, **f) for i, f in enumerate(({}, cut)))
    for a, b in zip(weights(one), weights(eight), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for key in ("loss", "loss_trace", "loss_answer"):
        assert one.state.log_history[1][key] == pytest.approx(eight.state.log_history[1][key], abs=1e-5)


@pytest.mark.parametrize("channel", ["hidden", "discrete"])
def test_packed_training_equals_unpacked(checkpoint, tmp_path, channel):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_length": 512, "channel": channel}
    alone = run(checkpoint, tmp_path / "a", per_device_train_batch_size=16, **options)
    packed = run(checkpoint, tmp_path / "b", packing=True, per_device_train_batch_size=4, **options)
    assert len(packed.train_dataset) < 4 and len(alone.train_dataset) == 16
    for a, b in zip(weights(alone), weights(packed), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(checkpoint, tmp_path):
    plain, saved = (run(checkpoint, tmp_path / str(c), max_steps=3, gradient_checkpointing=c) for c in (False, True))
    for a, b in zip(plain.state.log_history[:3], saved.state.log_history[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


@pytest.mark.parametrize("fields", [{"gradient_checkpointing": True}, {"dataloader_num_workers": 2}])
def test_an_epoch_of_many_lengths_compiles_two_graphs(checkpoint, tmp_path, monkeypatch, fields):
    """All layers share them: one is of the first length, should that be a special one, the other of any length."""
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    plain = run(checkpoint, tmp_path / "plain", **options)
    torch._dynamo.reset()
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiler, backend=counter))
    trainer = run(checkpoint, tmp_path / "compiled", compile_layers=True, **options, **fields)
    lengths = {batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()}
    assert len(lengths) > 2 and 1 <= counter.frame_count <= 2
    assert trainer.state.global_step == 16
    for a, b in zip(plain.state.log_history[:16], trainer.state.log_history[:16], strict=True):
        assert {**a, "grad_norm": 0} == pytest.approx({**b, "grad_norm": 0}, abs=1e-4)
    for (name, one), (other, two) in zip(
        plain.model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert name == other and torch.allclose(one, two, atol=1e-4)


def test_compiled_layers_and_zero3_are_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "is_deepspeed_zero3_enabled", lambda: True)
    args = BottleneckConfig(**settings(tmp_path, compile_layers=True))
    with pytest.raises(Refused, match="compile_layers does not go with DeepSpeed ZeRO-3.*use_liger_kernel"):
        check_settings(args, ModelConfig(model_name_or_path=str(checkpoint)))


def test_flash_kernels_are_refused_where_they_cannot_run(monkeypatch):
    with pytest.raises(Refused, match="is for attn_implementation: flex_attention and packing: true"):
        configs._check_flash("sdpa", packing=True)
    with pytest.raises(Refused, match="is for attn_implementation: flex_attention and packing: true"):
        configs._check_flash("flex_attention", packing=False)
    monkeypatch.setattr(configs, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="needs flash-attn-4; pip install"):
        configs._check_flash("flex_attention", packing=True)
    monkeypatch.setattr(configs, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(Refused, match="needs a Hopper card"):
        configs._check_flash("flex_attention", packing=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    configs._check_flash("flex_attention", packing=True)


def test_lora_trains_its_matrices_and_the_token_rows_only(checkpoint, tmp_path):
    trainer = run(checkpoint, tmp_path, peft_config=lora(checkpoint), max_steps=3)
    base = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trained) == 8 and len(trained) == 9  # A and B of 2 x 2 modules, the rows
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name or "trainable_tokens" in name
            if "lora_A" not in name:
                assert parameter.detach().abs().max() > 0, name  # lora_B starts at zero
        else:
            plain = name.replace("base_model.model.", "").replace("base_layer.", "").replace("token_adapter.", "")
            assert torch.equal(parameter, base[plain]), name
    merged = trainer.model.merge_and_unload()
    rows_before = base["model.embed_tokens.weight"]
    moved = (merged.get_input_embeddings().weight != rows_before).any(dim=1).nonzero().ravel().tolist()
    assert moved == sorted(token_ids(checkpoint))


def test_lora_saves_little_merges_tied_and_reloads_equal(checkpoint, tmp_path):
    trainer = run(checkpoint, tmp_path / "adapter", peft_config=lora(checkpoint), max_steps=3)
    trainer.save_model(str(tmp_path / "adapter"))
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    per_layer = 4 * (64 + 64) + 4 * (96 + 64)
    assert size < 4 * (2 * per_layer + 10 * 64) + 4096  # LoRA and ten rows in float32, and a header
    ids = torch.tensor([rows(checkpoint)[0]["prompt_ids"] + token_ids(checkpoint)])
    trainer.model.eval()
    with torch.no_grad():
        trained = trainer.model(ids).logits
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / "adapter")
        ).eval()
        assert torch.allclose(again(ids).logits, trained, atol=1e-6)
        merge_adapter(MergeArguments(str(tmp_path / "adapter"), str(tmp_path / "merged")))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(merged(ids).logits, trained, atol=1e-4)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert AbstractVocabulary.load(tmp_path / "merged") == AbstractVocabulary.load(checkpoint)
    with pytest.raises(ValueError, match="is an adapter; run `abscot merge"):  # its token rows would not be loaded
        AbstractVocabulary.load(tmp_path / "adapter")
    with pytest.raises(Refused, match="adapter_config.json"):
        merge_adapter(MergeArguments(str(checkpoint), str(tmp_path / "other")))


def test_bad_input_is_refused_before_training(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"max_length 24 is shorter than \d+ of 16 rows \(longest \d+ tokens\)"):
        run(checkpoint, tmp_path, max_length=24)
    with pytest.raises(ValueError, match="max_length 4 is shorter than 16 of 16 rows"):  # shorter than any prompt
        run(checkpoint, tmp_path, max_length=4, overlong="drop")
    lengths = [
        len(r["prompt_ids"]) + len(r["cot_ids"]) + len(r["trace"]) + 2 + len(r["answer_ids"]) for r in rows(checkpoint)
    ]
    trainer = run(checkpoint, tmp_path, max_length=40, overlong="drop")
    assert trainer.row_counts == {"rows": 16, "overlong_dropped": sum(n > 40 for n in lengths)}
    with pytest.raises(ValueError, match="flash_attention_2"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.config._attn_implementation_internal = "flash_attention_2"
        BottleneckSFTTrainer(model, BottleneckConfig(**settings(tmp_path)), rows(checkpoint))
    with pytest.raises(ValueError, match="whole matrices"):
        lora_config(
            ModelConfig(model_name_or_path=str(checkpoint), use_peft=True, lora_modules_to_save=["lm_head"]), [1]
        )
    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(plain)
    with pytest.raises(Refused, match="abstract_vocabulary.json is missing"):
        BottleneckSFTTrainer(str(plain), BottleneckConfig(**settings(tmp_path)), rows(checkpoint))


def test_the_global_batch_sets_the_accumulation(tmp_path):
    assert BottleneckConfig(**settings(tmp_path, global_batch_size=32)).gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match="global_batch_size 12 is no multiple of per_device_train_batch_size 8 x 1"):
        BottleneckConfig(**settings(tmp_path, global_batch_size=12))
    with pytest.raises(ValueError, match="leave one of the two out"):
        BottleneckConfig(**settings(tmp_path, global_batch_size=32, gradient_accumulation_steps=4))


def test_long_tailed_rows_waste_little(checkpoint, tmp_path):
    """Lengths like Dolci's: under 5 % of a step's positions are padding, and the steps say what they held."""
    rng, data = np.random.default_rng(0), rows(checkpoint, 400)
    lengths = np.clip(rng.lognormal(4.6, 0.8, 400), 8, 440).astype(int)
    data = data.remove_columns("cot_ids").add_column("cot_ids", [[7] * int(n) for n in lengths])
    for batch in (1, 4):
        trainer = run(
            checkpoint, tmp_path / str(batch), data=data, max_length=512, packing=True, pad_to_multiple_of=16,
            per_device_train_batch_size=batch, max_steps=-1, num_train_epochs=1, global_batch_size=8,
        )  # fmt: skip
        log = [entry for entry in trainer.state.log_history if "padding" in entry]
        assert len(log) == trainer.state.max_steps
        # Of several packed rows at once, the one that is left over pads a single step.
        assert sum(entry["padding"] >= 0.05 for entry in log) <= (batch > 1)
        assert sum(entry["sequences_per_step"] for entry in log) == pytest.approx(400)
        supervised = sum(len(r["trace"]) + 1 + len(r["answer_ids"]) for r in data)
        assert sum(entry["supervised_tokens_per_step"] for entry in log) == pytest.approx(supervised)
