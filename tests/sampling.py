"""What tests of sampling share: vLLM's settings on CPU and on a GPU, and a truncated softmax by hand."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
# float32 on a GPU is for vLLM's Triton attention, whose products are TF32 unless Triton is told otherwise.
GPU = {"TRITON_F32_DEFAULT": "ieee", "VLLM_HOST_IP": "127.0.0.1"}
ENVIRONMENT |= GPU if ON_GPU else {}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "gpu_memory_utilization": 0.1 if ON_GPU else 0.2,
    "max_model_len": 256,
    "block_size": 32,
}
# Several engines share a card, and none is to measure what the others leave; on a CPU they boot without warming up.
ENGINE["kv_cache_memory_bytes"] = 2**28 if ON_GPU else 2**26


def need_vllm(gpus: int = 0) -> None:
    """Skip where vLLM cannot run, or where there are fewer GPUs."""
    if not find_spec("vllm"):
        pytest.skip("needs vLLM")
    if torch.version.cuda is not None and not ON_GPU:
        pytest.skip("this is a CUDA build, and there is no GPU: needs the CPU build of vLLM")
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, {torch.cuda.device_count()} are here")


def truncated_softmax(logits: np.ndarray, temperature: float, top_p: float, top_k: int, barred=()) -> np.ndarray:
    """By hand: without the `barred`, the k likeliest, then the fewest of them that reach p together, renormalised."""
    p = np.exp((logits - logits.max()) / temperature)
    p[[*barred]] = 0
    kept = np.argsort(-p, kind="stable")[: top_k or len(p)]
    share = p[kept] / p[kept].sum()
    kept = kept[: 1 + int((np.cumsum(share) < top_p).sum())]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()
