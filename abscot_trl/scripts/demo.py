"""
The whole method on chain arithmetic, on a laptop: SFT without CoT (or any baseline), the paper's recipe and the
informed one at equal steps, from a tiny base model that speaks its CoT; every trace swapped; a table, results.json,
report.md, report.html.

    python -m abscot_trl.scripts.demo --config recipes/demo/demo.yaml --rounds 1
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("demo")
