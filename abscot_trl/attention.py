"""
The block mask of the bottleneck (section 3.2): one rule, its three renderings, and the hook that installs it.

Causal everywhere within a document, except that what y is read from never looks at what was reasoned in words:
positions of Y (and of the discrete channel's COPY) see neither C nor the DRAFT. Z attends to X, C and Z.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from abscot_trl.errors import Refused
from abscot_trl.examples import Segment

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def reads(segments: Tensor) -> Tensor:
    """Positions that must not look at the verbal reasoning: Y, and the discrete channel's copy of z."""
    return (segments == Segment.ANSWER) | (segments == Segment.COPY)


def verbal(segments: Tensor) -> Tensor:
    """Positions that hold the verbal reasoning: C, and the discrete channel's trace written in its sight."""
    return (segments == Segment.COT) | (segments == Segment.DRAFT)


def sees(q: Tensor, k: Tensor, q_document: Tensor, k_document: Tensor, q_reads: Tensor, k_verbal: Tensor) -> Tensor:
    """Whether query position `q` attends to key position `k`: the whole rule, elementwise on broadcastable tensors."""
    return (q >= k) & (q_document == k_document) & ~(q_reads & k_verbal)


def dense_mask(segments: Tensor, documents: Tensor) -> Tensor:
    """The rule as a bool tensor of shape (B, 1, L, L), True where attention is allowed (sdpa's form)."""
    position = torch.arange(segments.shape[1], device=segments.device)
    rows, columns = (slice(None), slice(None), None), (slice(None), None, slice(None))
    allowed = sees(
        position[:, None],
        position[None, :],
        documents[rows],
        documents[columns],
        reads(segments)[rows],
        verbal(segments)[columns],
    )
    return allowed[:, None]


def additive_mask(segments: Tensor, documents: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule as 0 and the dtype's minimum, shape (B, 1, L, L): eager's form, where a bool mask is silently wrong."""
    allowed = dense_mask(segments, documents)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@functools.cache
def _compiled_create_block_mask() -> Callable:
    """Made on first use, for it loads the compiler; one graph for rows of any length."""
    return torch.compile(create_block_mask, dynamic=True)


def codes(segments: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """
    The rule without its order, as one int32 a position for queries and one for keys, each of shape (B, L):

        same document, and not (q reads and k is verbal)  <=>  (query[q] ^ key[k]) < 3

    The document stands in the high bits, `reads` in the query's second, `verbal` in the key's first. With a load for
    each of the four, flex's forward kernel spills its registers: 27 times slower at head width 64 on an H100.
    """
    documents = documents.int() * 4
    return documents + 2 * reads(segments).int(), documents + verbal(segments).int()


def block_mask(segments: Tensor, documents: Tensor) -> BlockMask:
    """The rule as a flex BlockMask over (B, 1, L, L); blocks without an allowed pair are skipped by the kernel."""
    query, key = codes(segments, documents)

    def mask_mod(batch, head, q, k):
        return (q >= k) & ((query[batch, q] ^ key[batch, k]) < 3)

    batch, length = segments.shape
    # Compiled, the (L, L) intermediate of a long sequence is never written to memory.
    create = _compiled_create_block_mask() if segments.is_cuda else create_block_mask
    return create(mask_mod, batch, None, length, length, device=segments.device)


def check_supported(model: PreTrainedModel) -> None:
    """
    Raises:
        Refused: layers that would let y reach c past the mask (recurrent, sliding-window, ..), by the config; or a
            model that ignores the mask it is given, by trying: y must not change with c after one masked forward.
    """
    config, name = model.config, type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "attention"}
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        kinds.add("sliding_attention")
    if not getattr(config, "num_attention_heads", None) or not model._supports_sdpa or getattr(config, "alibi", False):
        kinds.add(f"the layers of {config.model_type}")
    if not kinds and _leaks(model):
        kinds.add(f"the attention of {config.model_type}")
    if kinds:
        raise Refused(
            f"{name} cannot carry the bottleneck mask: {', '.join(sorted(kinds))} let y reach c past it. "
            "Use a decoder whose layers are all full attention (Qwen3, Llama, Granite-4.0-Micro)"
        )


def _leaks(model: PreTrainedModel) -> bool:
    """Whether y changes with c in a one-layer model of the same kind, tiny and random, under the mask."""
    config = copy.deepcopy(model.config)
    heads = config.num_attention_heads
    shrunk = {
        "num_hidden_layers": 1,
        "hidden_size": 8 * heads,
        "intermediate_size": 16,
        "vocab_size": 32,
        "head_dim": 8,
    }
    for key, value in {**shrunk, "layer_types": None, "pad_token_id": 0, "bos_token_id": None}.items():
        if hasattr(config, key):
            setattr(config, key, value if key != "layer_types" else list(config.layer_types or [])[:1] or None)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):  # the CPU's: by default it starts CUDA on every card
        torch.default_generator.manual_seed(0)
        tiny = type(model)(config).float().eval()
    segments = torch.tensor([[1] * 4 + [2] * 6 + [3] * 3 + [4] * 4])
    ids = torch.arange(1, 18)[None]
    other = torch.where(segments == Segment.COT, ids + 10, ids)
    hook = tiny.base_model.register_forward_pre_hook(_install_mask, with_kwargs=True)
    with torch.no_grad():
        before, after = (tiny(i, attention_mask=torch.ones_like(i), segment_ids=segments).logits for i in (ids, other))
    hook.remove()
    return not torch.equal(before[segments == Segment.ANSWER], after[segments == Segment.ANSWER])


def _check_implementation(implementation: str | None) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise Refused(
            f"attention implementation {implementation!r} cannot carry the bottleneck mask; "
            f"set attn_implementation to one of {', '.join(IMPLEMENTATIONS)}"
        )


def use_bottleneck_mask(model: PreTrainedModel, kernels: str = "triton") -> PreTrainedModel:
    """
    Make `model(input_ids=, attention_mask=<2-D>, segment_ids=, document_ids=None)` apply the bottleneck mask.

    A pre-hook on the backbone builds the mask from `segment_ids` (B, L) and `document_ids` (B, L; for packed rows) and
    puts it where the model would put its own; calls without `segment_ids` (generation) are unchanged. Without
    `position_ids`, positions restart with each document. The model is changed in place and returned; a second call
    does nothing.

    Args:
        kernels (`str`): whose kernels run flex attention: `triton`, torch's own, or `flash`, flash-attn-4's.

    Raises:
        Refused: sliding-window or recurrent layers, or an attention implementation other than sdpa, eager and flex.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # beneath a PEFT wrapper
    check_supported(causal_lm)
    _check_implementation(causal_lm.config._attn_implementation)
    backbone = causal_lm.base_model
    if getattr(backbone, "_bottleneck_mask", None) is None:
        backbone._bottleneck_mask = backbone.register_forward_pre_hook(_install_mask, with_kwargs=True)
        backbone._flex_options = {"kernel_options": {"BACKEND": "FLASH"}} if kernels == "flash" else {}
    return model


def _install_mask(backbone: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    segments, documents = kwargs.pop("segment_ids", None), kwargs.pop("document_ids", None)
    if segments is None:
        return args, kwargs
    implementation = backbone.config._attn_implementation
    _check_implementation(implementation)
    if documents is None:
        documents = (segments != Segment.PAD).long()  # a pad position sees pads only, itself at least: no empty row
    elif kwargs.get("position_ids") is None:
        index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        kwargs["position_ids"] = index - torch.where(starts, index, 0).cummax(dim=1).values
    if implementation == "flex_attention":
        mask, kwargs = block_mask(segments, documents), kwargs | backbone._flex_options
    elif implementation == "eager":
        mask = additive_mask(segments, documents, _hidden_dtype(backbone))
    else:
        mask = dense_mask(segments, documents)
    # Backbones with several kinds of layers take a mask a kind; the others return a 4-D mask as it is.
    kwargs["attention_mask"] = {"full_attention": mask} if hasattr(backbone.config, "layer_types") else mask
    return args, kwargs


def _hidden_dtype(backbone: PreTrainedModel) -> torch.dtype:
    if torch.is_autocast_enabled("cuda" if backbone.device.type == "cuda" else "cpu"):
        return torch.get_autocast_dtype(backbone.device.type)
    return backbone.dtype
