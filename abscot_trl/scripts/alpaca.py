"""
Have a judge compare an evaluation's outputs on AlpacaEval's prompts with reference outputs.

    python -m abscot_trl.scripts.alpaca --outputs runs/x/alpacaeval \
        --reference_outputs runs/alpacaeval/alpaca_eval_gpt4_baseline.json \
        --judge http://127.0.0.1:8000 --judge_model NAME --output_dir runs/x/alpacaeval-judged
"""

from abscot_trl.evaluation.alpaca import AlpacaArguments, alpaca
from abscot_trl.phases import exit_with_words, parse
from abscot_trl.report.tables import results_table

if __name__ == "__main__":
    with exit_with_words("alpaca"):
        print(results_table(alpaca(*parse((AlpacaArguments,)))))
