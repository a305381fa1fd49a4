"""
Checkpoints on disk: a base model extended by the codebook, and an adapter merged back.

Every phase reads a full checkpoint and writes one. Tokenizer, embedding rows, config and `abstract_vocabulary.json`
of a checkpoint agree; that is verified after writing, on what is on disk.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from abscot_trl.attention import check_supported
from abscot_trl.card import new_origin, read_origin, save_origin, write_card
from abscot_trl.errors import Refused
from abscot_trl.storage import check_folder, written_whole
from abscot_trl.units import size_words
from abscot_trl.vocabulary import AbstractVocabulary

INITIALISATIONS = ("mean+noise", "normal", "zeros")


def _unreadable(path: str | Path, what: str, error: Exception) -> Refused:
    where = path if Path(path).exists() else f"{path} is no folder here, and as a model of the hub"
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return Refused(f"{where}: its {what} cannot be read ({words[:300]})")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        Refused: no tokenizer at `path`, a folder or hub id.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises nothing narrower
        if (Path(path) / "config.json").is_file():
            load_config(path)  # it is read for the tokenizer's class, and may be what is damaged
        raise _unreadable(path, "tokenizer", error) from error


def load_config(path: str | Path) -> PretrainedConfig:
    """
    Raises:
        Refused: no config.json of a model that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever a damaged value leads to
        raise _unreadable(path, "config.json", error) from error


def weight_files(folder: str | Path) -> list[Path]:
    index = Path(folder) / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
    return [Path(folder) / name for name in sorted(set(names))]


def empty_model(path: str | Path) -> PreTrainedModel:
    """
    The model at `path`, a folder or hub id, without its weights: on the meta device.

    Raises:
        Refused: no config.json of a decoder that transformers knows.
    """
    config = load_config(path)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a wrong value leads to
        raise _unreadable(path, "config.json", error) from error


def check_base(path: str | Path, vocabulary: AbstractVocabulary) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """
    What a base model must have before its weights are asked for.

    Returns:
        Its tokenizer, extended by `vocabulary`, and the model without weights.

    Raises:
        Refused: a tokenizer that already holds an abstract token, lacks EOS or one chat template; layers that cannot
            carry the bottleneck mask; fewer positions than a trace takes.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        missing = "chat template" if tokenizer.chat_template is None else "EOS token"
        raise Refused(f"{path}: the tokenizer has no {missing}; start from an instruction-tuned model")
    vocabulary.extend(tokenizer)
    model = empty_model(path)
    check_supported(model)
    positions = model.config.max_position_embeddings
    if vocabulary.m_max + 2 >= positions:
        raise Refused(f"m_max {vocabulary.m_max} exceeds the model's {positions} positions")
    return tokenizer, model


def check_model(path: str | Path, dtype: str | None = "auto") -> None:
    """
    What can be said of a model before its weights are loaded; of those in a folder only the headers are read.

    Raises:
        Refused: no model at `path`, weights that are cut or missing, or no such dtype.
    """
    if dtype not in ("auto", None) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise Refused(f"dtype {dtype!r} is none of torch: bfloat16, float16, float32 or auto")
    if is_deepspeed_zero3_enabled():  # it would divide a model that has no data
        load_config(path)
    else:
        empty_model(path)
    if not Path(path).is_dir():
        return
    try:
        for file in weight_files(path):
            with safe_open(file, "pt"):
                pass
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(path, "weights (safetensors)", error) from error
    try:  # transformers goes on without a damaged one
        if (Path(path) / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, "generation_config.json", error) from error


def load_model(path: str | Path, dtype: str | None = "auto", **options) -> PreTrainedModel:
    """
    Raises:
        Refused: as in [`check_model`].
    """
    check_model(path, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, "model", error) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):  # a GPU's memory, for one
            raise
        raise _unreadable(path, "model, whose weights are of another shape than its config.json,", error) from error


@dataclass
class InitArguments:
    """
    Extend a base model by the codebook.

    Args:
        base_model (`str`): folder or hub id of the base model.
        output_dir (`str`): where the extended checkpoint goes.
        codebook_size, m_min, m_max (`int`): the vocabulary and the length limits of a trace.
        initialisation (`str`): of the new embedding rows: `mean+noise`, `normal` (of the rows' mean norm) or `zeros`.
        seed (`int`): of that initialisation.
        codes (`str`, *optional*): folder of `abscot traces --method content`. `base_model` is then the extended
            checkpoint, and the row of each code becomes that of the token it stands for.
        dtype (`str`): as in `from_pretrained`; `auto` keeps the base model's.
    """

    base_model: str = field(metadata={"help": "Folder or hub id of the base model."})
    output_dir: str = field(metadata={"help": "Where the extended checkpoint goes."})
    codebook_size: int = field(default=64, metadata={"help": "Number M of codebook tokens."})
    m_min: int = field(default=0, metadata={"help": "Fewest codebook tokens of a sampled trace."})
    m_max: int = field(default=128, metadata={"help": "Most codebook tokens of a trace."})
    initialisation: str = field(
        default="mean+noise", metadata={"help": "Of the new embedding rows.", "choices": list(INITIALISATIONS)}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the initialisation."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights; 'auto' keeps the base model's."})
    codes: str | None = field(
        default=None, metadata={"help": "Content traces; codes begin as the tokens that they stand for."}
    )


def initial_rows(rows: Tensor, n: int, initialisation: str, generator: torch.Generator) -> Tensor:
    """
    `n` new embedding rows, shape (n, d), from the used rows (V, d).

    `mean+noise`: the mean row plus normal noise of a tenth of each dimension's spread, so that the new tokens start
    alike yet apart. `normal`: random directions of the rows' mean norm. `zeros`.
    """
    rows = rows.float()
    if initialisation == "zeros":
        return torch.zeros(n, rows.shape[1])
    noise = torch.randn(n, rows.shape[1], generator=generator)
    if initialisation == "mean+noise":
        return rows.mean(dim=0) + 0.1 * rows.std(dim=0) * noise
    if initialisation == "normal":
        return noise / noise.norm(dim=1, keepdim=True) * rows.norm(dim=1).mean()
    raise Refused(f"initialisation must be one of {', '.join(INITIALISATIONS)}, got {initialisation!r}")


def extend_model(
    model: PreTrainedModel, new_ids: list[int], initialisation: str = "mean+noise", seed: int = 0
) -> None:
    """
    Initialise the rows of `new_ids` in place, growing the matrices only if the ids lie beyond them, never shrinking.

    A tied head stays tied; an untied one gets its own new rows.
    """
    if max(new_ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(new_ids) + 1, mean_resizing=False)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    if head is not matrices[0]:
        matrices.append(head)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for matrix in matrices:
            used = matrix[: min(new_ids)]  # real tokens; rows beyond the tokenizer were never trained
            fresh = initial_rows(used, len(new_ids), initialisation, generator)
            matrix[torch.tensor(new_ids)] = fresh.to(matrix)


def verify_checkpoint(folder: str | Path, expected_rows: Tensor | None = None) -> AbstractVocabulary:
    """
    Check that the parts of a checkpoint agree. Of its weights the names and shapes are read, and the new rows.

    Raises:
        Refused: no `abstract_vocabulary.json`;
            a missing or split token, weights that are cut or too few, an embedding matrix without its rows, a head
            that is untied against the config, or rows that differ from `expected_rows` (M + 2, d).
    """
    vocabulary = AbstractVocabulary.load(folder)
    tokenizer, config = load_tokenizer(folder), load_config(folder)
    ids = vocabulary.all_ids(tokenizer)
    for token, index in zip([*vocabulary.tokens, vocabulary.begin, vocabulary.end], ids, strict=True):
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [index]:
            raise Refused(f"{folder}: the tokenizer splits {token!r}; run `abscot init` again")
    check_model(folder)
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # not by `from_config`: ZeRO-3 would divide it
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = (
        next(iter(revert_weight_conversion(model, {names[module]: module.weight})))  # in files: GPT-NeoX's `embed_out`
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    with ExitStack() as files:
        opened = [files.enter_context(safe_open(file, "pt")) for file in weight_files(folder)]
        tensors = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
        if embedding not in tensors:
            raise Refused(f"{folder}: its weights hold no {embedding}")
        for name in {embedding, head} & tensors.keys():
            if max(ids) >= (n := tensors[name].get_shape()[0]):
                raise Refused(f"{folder}: {n} embedding rows do not reach token id {max(ids)}")
        tied = bool(config.tie_word_embeddings)
        agrees = not tied or torch.equal(tensors[head][:], tensors[embedding][:]) if head in tensors else tied
        if not agrees:
            raise Refused(f"{folder}: tie_word_embeddings is {tied}, the weights say otherwise")
        stored = sum(math.prod(tensor.get_shape()) for name, tensor in tensors.items() if not tied or name != head)
        wanted = sum(tensor.numel() for tensor in set(model.state_dict(keep_vars=True).values()))  # buffers too
        if stored != wanted:
            raise Refused(f"{folder}: its weights hold {stored} numbers, a model of its config.json {wanted}")
        rows = tensors[embedding][min(ids) : max(ids) + 1][torch.tensor(ids) - min(ids)]
    if expected_rows is not None and not torch.equal(rows, expected_rows):
        raise Refused(f"{folder}: the abstract tokens' rows on disk differ from those written")
    return vocabulary


def init_checkpoint(args: InitArguments) -> Path:
    """
    `abscot init`: load a base model, add the codebook, write the extended checkpoint, verify it.

    Returns:
        `Path`: the checkpoint's folder.

    Raises:
        Refused: a tokenizer that already holds an abstract token, lacks EOS or one chat template; bad limits;
            the output is there already.
    """
    check_folder(args.output_dir)
    if args.codes:
        return _start_codes(args)
    vocabulary = AbstractVocabulary(args.codebook_size, args.m_min, args.m_max)
    tokenizer, _ = check_base(args.base_model, vocabulary)
    ids = vocabulary.all_ids(tokenizer)
    model = load_model(args.base_model, args.dtype)
    extend_model(model, ids, args.initialisation, args.seed)
    with written_whole(args.output_dir) as folder:
        save_checkpoint(model, tokenizer, vocabulary, folder, new_origin(args.base_model))
        verify_checkpoint(folder, model.get_input_embeddings().weight[torch.tensor(ids)])
        size = sum(file.stat().st_size for file in folder.iterdir())
    print(  # noqa: T201
        f"{args.base_model} with {len(ids)} more tokens: {vocabulary.size} of the codebook, {vocabulary.begin} and "
        f"{vocabulary.end}; a trace holds {vocabulary.m_min} to {vocabulary.m_max} codebook tokens. "
        f"{size_words(size)} on disk.\nnext: abscot data --tokenizer {args.output_dir} .."
    )
    return Path(args.output_dir)


def _start_codes(args: InitArguments) -> Path:
    """The extended checkpoint `base_model` with the codes' rows those of the tokens that they stand for."""
    from abscot_trl.traces.content import tokens_of_codes  # which loads models by this module

    vocabulary, tokens = AbstractVocabulary.load(args.base_model), tokens_of_codes(args.codes)
    tokenizer, model = load_tokenizer(args.base_model), load_model(args.base_model, args.dtype)
    if len(tokens) != vocabulary.size:
        raise Refused(
            f"{args.codes} has {len(tokens)} codes, {args.base_model} {vocabulary.size}; make the traces anew"
        )
    pairs = [(code, token) for code, token in zip(vocabulary.ids(tokenizer), tokens, strict=True) if token >= 0]
    codes, stands_for = torch.tensor(pairs).T
    with torch.no_grad():
        for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            matrix[codes] = matrix[stands_for]
    with written_whole(args.output_dir) as folder:
        save_checkpoint(model, tokenizer, vocabulary, folder, read_origin(args.base_model))
        rows = model.get_input_embeddings().weight[torch.tensor(vocabulary.all_ids(tokenizer))]
        verify_checkpoint(folder, rows)
    return Path(args.output_dir)


def save_checkpoint(
    model, tokenizer, vocabulary: AbstractVocabulary, folder: str | Path, origin: dict | None = None
) -> None:
    """Write weights (safetensors), tokenizer, vocabulary, origin where it is known, and model card into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    vocabulary.save(folder)
    save_origin(folder, origin or {})
    write_card(folder, vocabulary)


@dataclass
class MergeArguments:
    """
    Merge an adapter into the checkpoint it was trained on.

    Args:
        adapter (`str`): folder of the adapter.
        output_dir (`str`): where the merged checkpoint goes.
        base_checkpoint (`str`, *optional*): the checkpoint; read from the adapter when left out.
    """

    adapter: str = field(metadata={"help": "Folder of the adapter."})
    output_dir: str = field(metadata={"help": "Where the merged checkpoint goes."})
    base_checkpoint: str | None = field(
        default=None, metadata={"help": "The checkpoint it was trained on; read from the adapter when left out."}
    )


def merge_adapter(args: MergeArguments) -> Path:
    """
    `abscot merge`: fold LoRA weights and token rows into a full, still tied, checkpoint and verify it.

    Raises:
        Refused: no adapter there.
    """
    check_folder(args.output_dir)
    if not (Path(args.adapter) / "adapter_config.json").is_file():
        raise Refused(f"{args.adapter} holds no adapter_config.json; full fine-tuning needs no merge")
    try:
        base = args.base_checkpoint or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable(args.adapter, "adapter_config.json", error) from error
    vocabulary, tokenizer, model = AbstractVocabulary.load(base), load_tokenizer(base), load_model(base)
    try:
        adapted = PeftModel.from_pretrained(model, args.adapter)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:  # RuntimeError: of a model of other shape
        raise _unreadable(args.adapter, "adapter", error) from error
    merged = adapted.merge_and_unload()
    with written_whole(args.output_dir) as folder:
        save_checkpoint(merged, tokenizer, vocabulary, folder, read_origin(args.adapter))
        verify_checkpoint(folder)
    return Path(args.output_dir)
