"""
Score a model in verbal, direct and abstract mode, with every swap of the trace.

    python -m abscot_trl.scripts.evaluate --config recipes/qwen3-4b/evaluate.yaml \
        --model runs/qwen3-4b/distill-merged --output_dir runs/qwen3-4b/math500
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("evaluate")
