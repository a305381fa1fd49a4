"""Which tokens make a word together, by the text that they stand for."""

import numpy as np
import regex
from transformers import PreTrainedTokenizerBase

# Letters, marks and digits, and a point or comma between two digits. Letters of scripts without capitals (Lo) are left
# out: many of these put no spaces between words.
WORD = regex.compile(r"(?V1)(?:[[\p{L}\p{M}\p{N}]--\p{Lo}]|(?<=\d)[.,](?=\d))+")


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    The text of each token id, with its spaces: (V,). Of a tokenizer that puts its own spaces between tokens all are
    empty, for what it joins cannot be told.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    texts = tokenizer.batch_decode([[i] for i in range(size)])
    for i, token in enumerate(tokenizer.convert_ids_to_tokens([*range(size)])):
        if token and token.startswith("\u2581"):  # a space, which some tokenizers lose at the beginning of a text
            texts[i] = " " + texts[i]
    seven = tokenizer("7", add_special_tokens=False)["input_ids"][-1]
    joins = tokenizer.decode([seven, seven]).strip() == (2 * texts[seven]).strip()
    return texts if joins else [""] * size


def words(ids: list[int], texts: list[str]) -> np.ndarray:
    """Of each token the number of its word, from 0 on: (n,); one that holds no part of a word stands alone."""
    pieces = [texts[i] for i in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = np.array([match.span() for match in WORD.finditer("".join(pieces))], int).reshape(-1, 2)
    first, last = (np.searchsorted(ends, at, side="right") for at in (spans[:, 0], spans[:, 1] - 1))
    joined = np.zeros(len(ids) + 1, int)
    np.add.at(joined, first + 1, 1)
    np.add.at(joined, last + 1, -1)
    return np.cumsum(np.cumsum(joined[:-1]) == 0) - 1
