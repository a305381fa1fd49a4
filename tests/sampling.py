"""What tests of sampling share: vLLM's settings on CPU, and a truncated softmax by hand."""

import numpy as np

CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "gpu_memory_utilization": 0.2,
    "max_model_len": 256,
    "block_size": 32,
}


def truncated_softmax(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """By hand: the k likeliest, then the fewest of them that reach p together, renormalised."""
    p = np.exp((logits - logits.max()) / temperature)
    kept = np.argsort(-p, kind="stable")[: top_k or len(p)]
    share = p[kept] / p[kept].sum()
    kept = kept[: 1 + int((np.cumsum(share) < top_p).sum())]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()
