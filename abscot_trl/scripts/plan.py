"""
What a warm-up will take: steps, tokens, memory, disk, hours.

    python -m abscot_trl.scripts.plan --config recipes/qwen3-4b/warmup.informed.yaml --gpu h200
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("plan")
