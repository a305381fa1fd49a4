"""
Phase B: self-distillation (eq. 4).

    accelerate launch --config_file accelerate_configs/single.yaml -m abscot_trl.scripts.distill \
        --config recipes/qwen3-4b/distill.lora.yaml
"""

from abscot_trl.phases import main

if __name__ == "__main__":
    main("distill")
