"""
Evaluate the base and every model of a warm-up's rounds.

    python -m abscot_trl.scripts.sweep --run runs/qwen3-4b/informed --evaluate recipes/benchmarks/math500.yaml
"""

from abscot_trl.loop.sweep import SweepArguments, sweep
from abscot_trl.phases import exit_with_words, parse

if __name__ == "__main__":
    with exit_with_words("sweep"):
        sweep(*parse((SweepArguments,)))
