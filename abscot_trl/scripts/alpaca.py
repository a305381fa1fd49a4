"""
Have a judge compare an evaluation's outputs on AlpacaEval's prompts with reference outputs.

    python -m abscot_trl.scripts.alpaca --outputs runs/x/alpacaeval \
        --reference_outputs runs/alpacaeval/alpaca_eval_gpt4_baseline.json \
        --judge http://127.0.0.1:8000 --judge_model NAME --output_dir runs/x/alpacaeval-judged
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("alpaca")
