"""The codebook V_abs: M reserved tokens and the two delimiters of an abstract trace (section 3.1)."""

import json
import string
from dataclasses import asdict, dataclass
from itertools import count, islice, product
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from abscot_trl.errors import Refused
from abscot_trl.storage import read_json

FILE_NAME = "abstract_vocabulary.json"
LARGEST = 2**16  # codebook, and most tokens of a trace


def _letters():
    """A .. Z, AA, AB, .. as in spreadsheet columns."""
    for length in count(1):
        yield from map("".join, product(string.ascii_uppercase, repeat=length))


def _abstract_template(template: str, begin: str) -> str:
    """
    A chat template whose generation prompt ends in `begin`, thinking off, unless `abstract=false`: then it renders
    what `template` does, to the character.
    """
    abstract = "abstract is not defined or abstract"
    opening = f"{{% if {abstract} %}}{{% set enable_thinking = false %}}{{% endif %}}\n"  # its newline is trimmed
    closing = f"{{{{ '{begin}' if add_generation_prompt and ({abstract}) else '' }}}}"  # {{ }} trims no whitespace
    return opening + template.removesuffix("\n") + closing  # Jinja drops a template's last newline


@dataclass(frozen=True)
class AbstractVocabulary:
    """
    The reserved tokens and the length limits of a trace. Kept beside the weights in `abstract_vocabulary.json`.

    Args:
        size (`int`, *optional*, defaults to `64`):
            Number M of codebook tokens.
        m_min (`int`, *optional*, defaults to `0`):
            Fewest codebook tokens a sampled trace may hold.
        m_max (`int`, *optional*, defaults to `128`):
            Most codebook tokens a trace may hold; the end delimiter is forced after them.
    """

    size: int = 64
    m_min: int = 0
    m_max: int = 128

    begin = "<beginabstract>"
    end = "<endabstract>"

    def __post_init__(self):
        if self.size < 1:
            raise Refused(f"the codebook needs at least one token, got size={self.size}")
        if max(self.size, self.m_max) > LARGEST:
            raise Refused(f"size={self.size!s:.20} and m_max={self.m_max!s:.20} may be {LARGEST} at most")
        if not 0 <= self.m_min <= self.m_max or self.m_max < 1:
            raise Refused(
                f"trace lengths need 0 <= m_min <= m_max and m_max >= 1, got m_min={self.m_min}, m_max={self.m_max}"
            )

    @property
    def tokens(self) -> list[str]:
        """The codebook in order: `<TOKEN_A>` .. `<TOKEN_Z>`, `<TOKEN_AA>`, .."""
        return [f"<TOKEN_{name}>" for name in islice(_letters(), self.size)]

    def extend(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """
        Add codebook and delimiters to `tokenizer` as special tokens; returns how many were added (M + 2).

        Its chat template, if any, then ends a generation prompt in `<beginabstract>`; with the template variable
        `abstract=False` it renders as before.

        Raises:
            Refused: the tokenizer already holds one of them, or has several chat templates.
        """
        template = tokenizer.chat_template
        if not isinstance(template, str | None):
            raise Refused(
                f"the tokenizer of {tokenizer.name_or_path!r} has {len(template)} chat templates "
                f"({', '.join(template)}); set tokenizer.chat_template to the one that you train with"
            )
        wanted = [*self.tokens, self.begin, self.end]
        held = [token for token in wanted if token in tokenizer.get_vocab()]
        if held:
            raise Refused(
                f"the tokenizer of {tokenizer.name_or_path!r} already holds {held[0]!r} ({len(held)} of {len(wanted)} "
                "abstract tokens); start from a base model that was not extended before"
            )
        if template is not None:
            tokenizer.chat_template = _abstract_template(template, self.begin)
        return tokenizer.add_tokens(
            [AddedToken(t, special=True, normalized=False) for t in wanted], special_tokens=True
        )

    def _find(self, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in tokens if token not in vocabulary]
        if missing:
            raise Refused(
                f"the tokenizer of {tokenizer.name_or_path!r} has no {missing[0]!r}; run `abscot init` first"
            )
        return [vocabulary[token] for token in tokens]

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the codebook, in order, shape (M,)."""
        return self._find(tokenizer, self.tokens)

    def begin_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self._find(tokenizer, [self.begin])[0]

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self._find(tokenizer, [self.end])[0]

    def all_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Codebook, begin and end: the M + 2 rows a checkpoint was extended by."""
        return self._find(tokenizer, [*self.tokens, self.begin, self.end])

    def save(self, folder: str | Path) -> None:
        (Path(folder) / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "AbstractVocabulary":
        """
        Read the vocabulary kept in a checkpoint.

        Raises:
            Refused: the folder holds no `abstract_vocabulary.json`;
                the file is not what `save` writes, or the folder holds an adapter that was not merged.
        """
        path = Path(folder) / FILE_NAME
        if (Path(folder) / "adapter_config.json").is_file():  # loaded as a model it would lack its token rows
            raise Refused(f"{folder} is an adapter; run `abscot merge --adapter {folder} --output_dir ..` first")
        if not path.is_file():
            raise Refused(f"{path} is missing: not an extended checkpoint; run `abscot init` first")
        settings = read_json(path, "run `abscot init` again", size=int, m_min=int, m_max=int)
        return cls(settings["size"], settings["m_min"], settings["m_max"])
