"""
The policy iteration: T rounds of traces, bottleneck, traces, distillation, evaluation.

    python -m abscot_trl.scripts.warmup --config recipes/qwen3-4b/warmup.informed.yaml --run_dir runs/name
"""

from abscot_trl.loop.warmup import WarmupArguments, warmup
from abscot_trl.phases import exit_with_words, parse

if __name__ == "__main__":
    with exit_with_words("warmup"):
        warmup(*parse((WarmupArguments,)))
