"""
The base model's own shortest right answers, as rows to train on.

    python -m abscot_trl.scripts.concise --config recipes/qwen3-4b/concise.yaml
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("concise")
