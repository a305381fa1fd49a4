"""
Train and evaluate the baselines on a warm-up's rows, for as many steps.

    python -m abscot_trl.scripts.baselines --config recipes/qwen3-4b/baselines.yaml
"""

from abscot_trl.loop.baselines import BaselinesArguments, baselines
from abscot_trl.phases import exit_with_words, parse

if __name__ == "__main__":
    with exit_with_words("baselines"):
        baselines(*parse((BaselinesArguments,)))
