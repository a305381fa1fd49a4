"""
Phase B: self-distillation (eq. 4).

    accelerate launch --config_file accelerate_configs/single.yaml -m abscot_trl.scripts.distill \
        --config recipes/qwen3-4b/distill.lora.yaml
"""

from abscot_trl.cli import run_script

if __name__ == "__main__":
    run_script("distill")
