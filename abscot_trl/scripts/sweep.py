"""
Evaluate the base and every model of a warm-up's rounds.

    python -m abscot_trl.scripts.sweep --run runs/qwen3-4b/informed --evaluate recipes/benchmarks/math500.yaml
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("sweep")
