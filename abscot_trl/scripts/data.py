"""
Prepare rows: parse, tokenise, filter, count.

    python -m abscot_trl.scripts.data --config recipes/qwen3-4b/data.yaml
"""

from abscot_trl.phases import main

if __name__ == "__main__":
    main("data")
