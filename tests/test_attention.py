"""The mask proven by what a model does under it, never by how it was built."""

import pytest
import torch
from tiny import tiny_model
from torch.nn.attention.flex_attention import create_mask
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from abscot_trl.attention import block_mask, dense_mask, use_bottleneck_mask
from abscot_trl.examples import Collator, Encoder, Segment, pack

FAMILIES = ["qwen3", "llama", "granite"]
# ids 50..57 are the codebook, 58 begin, 59 end
ENCODER = {channel: Encoder(list(range(50, 58)), 58, 59, channel=channel) for channel in ("hidden", "discrete")}


def row(channel: str = "hidden", seed: int = 0, lengths: tuple[int, int, int, int] = (7, 11, 5, 6)) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x, c, y = (torch.randint(2, 50, (n,), generator=generator).tolist() for n in (lengths[0], lengths[1], lengths[3]))
    z = torch.randint(0, 8, (lengths[2],), generator=generator).tolist()
    return ENCODER[channel](x, c, z, y)


def logits(model, rows: list[dict], multiple: int = 1) -> tuple[torch.Tensor, dict]:
    batch = Collator(0, multiple)([dict(row) for row in rows])
    inputs = {
        key: batch[key] for key in ("input_ids", "attention_mask", "segment_ids", "document_ids", "position_ids")
    }
    with torch.no_grad():
        return model(**inputs).logits, batch


def with_other_cot(row: dict) -> dict:
    """The same row with every CoT token replaced."""
    ids = [
        (t + 17) % 48 + 2 if s == Segment.COT else t for t, s in zip(row["input_ids"], row["segment_ids"], strict=True)
    ]
    return {**row, "input_ids": ids}


def change_at(model, channel: str, segments: set[Segment]) -> float:
    """Largest change of the logits at `segments` when the CoT changes."""
    original = row(channel)
    before, batch = logits(model, [original])
    after, _ = logits(model, [with_other_cot(original)])
    where = torch.isin(batch["segment_ids"], torch.tensor([int(s) for s in segments]))
    assert where.any()
    return (before - after).abs()[where].max().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channel", ["hidden", "discrete"])
def test_one_layer_carries_nothing_of_the_cot_to_the_answer(family, channel):
    model = use_bottleneck_mask(tiny_model(family, layers=1))
    assert change_at(model, channel, {Segment.ANSWER}) == 0.0  # bit-equal
    assert change_at(model, channel, {Segment.TRACE, Segment.DRAFT}) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_two_layers_carry_the_cot_through_hidden_states_only(family):
    model = use_bottleneck_mask(tiny_model(family, layers=2))
    assert change_at(model, "hidden", {Segment.ANSWER}) > 1e-3
    assert change_at(model, "discrete", {Segment.ANSWER, Segment.COPY}) == 0.0
    assert change_at(model, "hidden", {Segment.TRACE}) > 1e-3
    assert change_at(model, "discrete", {Segment.DRAFT}) > 1e-3


def test_without_the_hook_the_answer_does_read_the_cot():
    """The two tests above could not pass on a plain model."""
    model = tiny_model(layers=1)
    original = row()
    ids, other = (torch.tensor([r["input_ids"]]) for r in (original, with_other_cot(original)))
    with torch.no_grad():
        change = (model(ids).logits - model(other).logits).abs()[0]
    assert change[torch.tensor(original["segment_ids"]) == Segment.ANSWER].max() > 1e-3


def test_answer_reads_the_trace():
    """The channel is open: other trace tokens change the answer's logits, in both channels."""
    model = use_bottleneck_mask(tiny_model(layers=1))
    for channel in ("hidden", "discrete"):
        original = row(channel)
        swapped = {**original, "input_ids": [50 if 50 <= t < 58 else t for t in original["input_ids"]]}
        before, batch = logits(model, [original])
        after, _ = logits(model, [swapped])
        assert (before - after).abs()[batch["segment_ids"] == Segment.ANSWER].max() > 1e-3


def test_distillation_row_is_plain_causal():
    """[x; z; y] under the hook equals the model without it; calls without segments are untouched."""
    plain, hooked = tiny_model(), use_bottleneck_mask(tiny_model())
    distillation = ENCODER["hidden"]([3, 4, 5, 6], None, [1, 2, 3], [7, 8, 1])
    masked, batch = logits(hooked, [distillation])
    with torch.no_grad():
        assert torch.allclose(masked, plain(batch["input_ids"]).logits, atol=1e-5)
        assert torch.equal(hooked(batch["input_ids"]).logits, plain(batch["input_ids"]).logits)


def test_flex_renders_the_rule_of_the_dense_mask():
    """Every pair of random layouts: all segments in any order, pads, more documents than fit 16 bits apart."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        segments = torch.randint(0, len(Segment), (2, 128), generator=generator)
        documents = torch.randint(0, 2, (2, 128), generator=generator).cumsum(1) * 70_001
        mask_mod = block_mask(segments, documents).mask_mod
        assert torch.equal(create_mask(mask_mod, 2, 1, 128, 128, device="cpu"), dense_mask(segments, documents))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channel", ["hidden", "discrete"])
def test_packed_equals_unpacked(family, channel):
    model = use_bottleneck_mask(tiny_model(family))
    rows = [row(channel, seed, (5 + seed, 9, 3 + seed, 4)) for seed in range(4)]
    packed = pack([dict(r) for r in rows], 140)
    assert len(packed) == 1
    together, batch = logits(model, packed, multiple=128)
    assert batch["input_ids"].shape[1] % 128 == 0
    order = sorted(range(4), key=lambda i: -len(rows[i]["input_ids"]))
    for document, i in enumerate(order, 1):
        alone, _ = logits(model, [rows[i]])
        assert (together[batch["document_ids"] == document] - alone[0]).abs().max() < 2e-5


def test_positions_restart_by_themselves():
    """Without position_ids the hook gives each document its own."""
    model = use_bottleneck_mask(tiny_model())
    batch = Collator(0, 1)(pack([row(seed=s) for s in range(3)], 200))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "segment_ids", "document_ids")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs, position_ids=batch["position_ids"]).logits)


def test_padding_changes_nothing_on_either_side():
    model = use_bottleneck_mask(tiny_model())
    original = row()
    alone, _ = logits(model, [original])
    padded, batch = logits(model, [original, row(lengths=(20, 30, 6, 9))], multiple=128)
    assert torch.isfinite(padded).all()  # a pad position sees itself at least
    assert torch.allclose(padded[0, : alone.shape[1]], alone[0], atol=1e-5)
    left = {key: torch.tensor([[0] * 5 + original[key]]) for key in ("input_ids", "segment_ids", "position_ids")}
    with torch.no_grad():
        shifted = model(**left, attention_mask=(left["segment_ids"] > 0).long()).logits
    assert torch.allclose(shifted[0, 5:], alone[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_agree(family):
    rows = [*pack([row("hidden", 1), row("discrete", 2)], 128), *pack([row("hidden", 3, (9, 40, 6, 8))], 128)]
    found = {}
    for implementation in ("sdpa", "eager", "flex_attention"):
        model = use_bottleneck_mask(tiny_model(family, attn_implementation=implementation))
        found[implementation], batch = logits(model, rows, multiple=128)
    real = batch["segment_ids"] != Segment.PAD
    for implementation in ("eager", "flex_attention"):
        assert (found["sdpa"] - found[implementation])[real].abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["triton", "flash"])
def test_each_layer_asks_for_the_kernels(family, kernels, monkeypatch):
    """As torch's flex_attention would be called: nothing by default, which lets torch choose among its own."""
    asked, attend = [], ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def record(*args, **kwargs):
        asked.append(kwargs.pop("kernel_options", None))
        return attend(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", record)
    logits(use_bottleneck_mask(tiny_model(family, attn_implementation="flex_attention"), kernels), [row()], 128)
    assert len(asked) > 1 and asked == [{"BACKEND": "FLASH"} if kernels == "flash" else None] * len(asked)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = use_bottleneck_mask(tiny_model()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = Collator(0, 1)([row(seed=4)])
        batch.pop("loss_weights")
        model(**batch, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_models_that_cannot_carry_the_mask_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=8,
        )
    )
    hybrid = tiny_model("qwen3")
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    for model, word in [(mamba, "mamba"), (sliding, "sliding_attention"), (hybrid, "linear_attention")]:
        with pytest.raises(ValueError, match=f"cannot carry the bottleneck mask.*{word}"):
            use_bottleneck_mask(model)
    flash = tiny_model()
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa, eager, flex_attention"):
        use_bottleneck_mask(flash)


def test_a_model_that_ignores_the_mask_is_refused_by_trying():
    config = OPTConfig(
        vocab_size=32, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    with pytest.raises(ValueError, match="OPTForCausalLM cannot carry the bottleneck mask: the attention of opt"):
        use_bottleneck_mask(OPTForCausalLM(config))
    use_bottleneck_mask(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)))
