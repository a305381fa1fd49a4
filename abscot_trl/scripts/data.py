"""
Prepare rows: parse, tokenise, filter, count.

    python -m abscot_trl.scripts.data --config recipes/qwen3-4b/data.yaml
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("data")
