"""
Phase B: self-distillation (eq. 4).

    accelerate launch --config_file accelerate_configs/single.yaml -m abscot_trl.scripts.distill \
        --config recipes/qwen3-4b/distill.lora.yaml --model_name_or_path runs/qwen3-4b/bottleneck-merged \
        --data runs/qwen3-4b/data --traces runs/qwen3-4b/distill-traces --output_dir runs/qwen3-4b/distill
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("distill")
