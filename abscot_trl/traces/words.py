"""Which tokens make a word together: those between which the text goes on with a letter or digit."""

import unicodedata

import numpy as np
from transformers import PreTrainedTokenizerBase


def word_edges(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """
    Whether the text of each token id begins, and ends, within a word: (2, V).

    Letters of scripts without capitals (category Lo) count as none, for many of these put no spaces between words; nor
    does part of a character.
    """
    tokens = tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    texts = tokenizer.batch_decode([[i] for i in range(len(tokens))])
    for i, token in enumerate(tokens):
        if token and token.startswith("\u2581"):  # a space, which some tokenizers lose at the beginning of a text
            texts[i] = " " + texts[i]
    return np.array([[_of_a_word(text[at:][:1]) for text in texts] for at in (0, -1)])


def _of_a_word(character: str) -> bool:
    return character.isalnum() and unicodedata.category(character) != "Lo"


def words(ids: list[int], edges: np.ndarray) -> np.ndarray:
    """Of each token the number of its word, from 0: (n,) both."""
    begins, ends = edges[:, ids]
    return np.concatenate([[0], np.cumsum(~(ends[:-1] & begins[1:]))])[: len(ids)]
