"""
Merge an adapter into the checkpoint it was trained on.

    python -m abscot_trl.scripts.merge --adapter runs/qwen3-4b/bottleneck --output_dir runs/qwen3-4b/bottleneck-merged
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("merge")
