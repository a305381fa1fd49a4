"""
Train and evaluate the baselines on a warm-up's rows, for as many steps.

    python -m abscot_trl.scripts.baselines --config recipes/qwen3-4b/baselines.yaml
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("baselines")
