"""
Merge an adapter into the checkpoint it was trained on.

    python -m abscot_trl.scripts.merge --adapter runs/x/bottleneck --output_dir runs/x/bottleneck-merged
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("merge")
