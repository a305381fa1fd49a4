"""
What a warm-up will take: steps, tokens, memory, disk, hours.

    python -m abscot_trl.scripts.plan --config recipes/qwen3-4b/warmup.informed.yaml --gpu h200
"""

from abscot_trl.loop.plan import PlanArguments, describe_plan, plan
from abscot_trl.phases import exit_with_words, parse

if __name__ == "__main__":
    with exit_with_words("plan"):
        print(describe_plan(plan(*parse((PlanArguments,)))))
