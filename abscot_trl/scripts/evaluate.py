"""
Score a model in verbal, direct and abstract mode, with every swap of the trace.

    python -m abscot_trl.scripts.evaluate --config recipes/qwen3-4b/evaluate.yaml --model runs/x/distill-merged
"""

from abscot_trl.phases import main

if __name__ == "__main__":
    main("evaluate")
