"""
Attention kernels alone, forward and backward, under the bottleneck mask and under a causal one; one GPU, 2 minutes.

    python tests/benchmarks/bench_attention.py             # `make bench-attention`
    python tests/benchmarks/bench_attention.py --length 32768

Qwen3-4B's heads (32 over 8 of width 128) in bf16, one row, nine tenths of it CoT. `flash` is flex's other back end
(flash-attn-4), left out where that is not installed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from figures import RESULTS, record
from models import long_lengths
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from abscot_trl.attention import block_mask
from abscot_trl.examples import Segment


def seconds(call: Callable, repeats: int = 9) -> float:
    """Median, by the GPU's clock."""
    found = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return median(found[3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    args = parser.parse_args()
    length, parts = args.length, long_lengths(args.length)
    kinds = [(Segment.PROMPT, parts["prompt"]), (Segment.COT, parts["cot"]), (Segment.TRACE, parts["trace"] + 2)]
    kinds += [(Segment.ANSWER, parts["answer"])]
    segments = torch.tensor([[int(kind) for kind, count in kinds for _ in range(count)]], device="cuda")
    masked = block_mask(segments, torch.ones_like(segments))
    causal = create_block_mask(lambda b, h, q, k: q >= k, 1, None, length, length, device="cuda")
    heads = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(1, n, length, 128, **heads) for n in (32, 8, 8))
    gradient = torch.randn_like(query)

    def sdpa(backend: SDPBackend) -> Callable:
        def call():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )

        return call

    def flex(mask, dynamic: bool = False, **options) -> Callable:
        compiled = torch.compile(
            lambda q, k, v, m: flex_attention(q, k, v, block_mask=m, enable_gqa=True, kernel_options=options or None),
            dynamic=dynamic,
        )
        return lambda: compiled(query, key, value, mask)

    kernels = {
        "cudnn, causal": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash 2, causal": sdpa(SDPBackend.FLASH_ATTENTION),
        "flex, causal": flex(causal),
        "flex, bottleneck": flex(masked),
        "flex for any length, bottleneck": flex(masked, dynamic=True),
        "flex by flash 4, bottleneck": flex(masked, BACKEND="FLASH"),
    }
    for name, call in kernels.items():
        try:
            forward = seconds(call)
            both = seconds(lambda call=call: torch.autograd.grad(call(), (query, key, value), gradient))
        except Exception as failure:  # not installed, or not for this card
            print(f"{name}: {type(failure).__name__}: {str(failure).strip().splitlines()[-1][:200]}", flush=True)
            continue
        row = {"name": f"attention-{length}: {name}", "value": round(both * 1000, 3), "unit": "ms, both passes"}
        row |= {"forward": round(forward * 1000, 3), "backward": round((both - forward) * 1000, 3), "baseline": None}
        print(json.dumps(row), flush=True)
        record(args.output, [row], "make bench-attention")
    return 0


if __name__ == "__main__":
    sys.exit(main())
