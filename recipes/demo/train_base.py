"""
Trains the demo's base model: a tiny Qwen3 that speaks the verbal CoT of chain arithmetic. Its result is shipped in
recipes/demo/base with the log it printed (train_base.log).

    python recipes/demo/train_base.py --output recipes/demo/base --steps 400
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from abscot_trl import examples
from abscot_trl.data.toy import chain_arithmetic, toy_tokenizer
from abscot_trl.training.baselines import BaselineTrainer
from abscot_trl.training.configs import BaselineConfig
from abscot_trl.vocabulary import AbstractVocabulary


def train(
    rows: list[examples.Example], output: str | Path, steps: int, hidden: int = 128, layers: int = 4, seed: int = 1
) -> None:
    """Saves in `output` a model that writes the verbal CoT of `rows`, whose text the toy tokenizer knows."""
    tokenizer = toy_tokenizer()
    set_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    dataset = Dataset.from_dict(
        {
            "prompt_ids": [examples.prompt_ids(row.prompt, tokenizer) for row in rows],
            "cot_ids": [examples.cot_columns(row.cot, tokenizer)["cot_ids"] for row in rows],
            "answer_ids": [examples.answer_ids(row.answer, tokenizer) for row in rows],
        }
    )
    # The trainer wants a codebook; no abstract token appears in a row.
    extended = toy_tokenizer()
    vocabulary = AbstractVocabulary(size=1)
    vocabulary.extend(extended)
    training = BaselineConfig(
        baseline="cot",
        output_dir=f"{output}-training",
        max_steps=steps,
        per_device_train_batch_size=128,
        learning_rate=2.0e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        adam_beta2=0.99,
        weight_decay=0.01,
        pad_to_multiple_of=8,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=50,
        save_strategy="no",
        seed=seed,
        max_length=128,
    )
    BaselineTrainer(model, training, dataset, vocabulary=vocabulary, processing_class=extended).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--chain_steps", type=int, default=6)
    parser.add_argument("--modulus", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows = chain_arithmetic(args.rows, args.chain_steps, args.modulus, args.seed)
    train(rows, args.output, args.steps, args.hidden, args.layers, args.seed)


if __name__ == "__main__":
    main()
