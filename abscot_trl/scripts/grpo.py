"""
Stage 2: GRPO over trace and answer (eq. 5), from a warm-started and merged checkpoint.

    accelerate launch --config_file accelerate_configs/single.yaml -m abscot_trl.scripts.grpo \
        --config recipes/qwen3-4b/grpo.lora.yaml --model_name_or_path runs/qwen3-4b/informed/round1/distill-merged \
        --output_dir runs/qwen3-4b/informed/grpo
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("grpo")
