"""
The policy iteration: T rounds of traces, bottleneck, traces, distillation, evaluation.

    python -m abscot_trl.scripts.warmup --config recipes/qwen3-4b/warmup.informed.yaml --run_dir runs/name
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("warmup")
