"""
Upload a trained checkpoint to the hub; shows what would go there, and asks first.

    python -m abscot_trl.scripts.push --model runs/qwen3-4b/informed/round1/distill-merged --repo my-model
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("push")
