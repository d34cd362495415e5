"""Tokenizers of the synthetic tasks: one token a word, or one token a letter."""

import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlmlib.errors import check

PAD, MASK, EOS, BOS = SPECIAL_TOKENS = ("[PAD]", "[MASK]", "[EOS]", "[BOS]")


class WordTokenizer(PreTrainedTokenizerFast):
    """A PreTrainedTokenizerFast that names the word it does not know.

    The vocabulary is closed and has no [UNK]: a misspelt word is an error, not a token.
    Everything else (special ids, padding, `save_pretrained`) is transformers' own.
    """

    def _encode_plus(self, text, *args, **kwargs):
        try:
            return super()._encode_plus(text, *args, **kwargs)
        except Exception as error:  # the tokenizers library raises a bare Exception
            unknown = self.unknown_words(text)
            if not unknown:
                raise
            expected = f"one of the {len(self)} tokens of the vocabulary"
            raise ValueError(f"word={unknown[0]!r}: expected {expected}") from error

    def unknown_words(self, text: str | list | tuple) -> list[str]:
        """Words of `text` that are not in the vocabulary, in order.

        Args:
            text: a string, or (nested) lists of strings.

        Returns:
            The unknown words; empty if `text` can be encoded.

        Introduced in notebook 01.
        """
        if isinstance(text, list | tuple):
            return [word for part in text for word in self.unknown_words(part)]
        if not isinstance(text, str):
            return []  # not text at all: transformers' own error says so
        parts = re.split("|".join(map(re.escape, SPECIAL_TOKENS)), text)
        split = self.backend_tokenizer.pre_tokenizer.pre_tokenize_str
        words = [word for part in parts for word, _ in split(part)]
        vocabulary = self.get_vocab()
        return [word for word in words if word not in vocabulary]


def word_tokenizer(words: Sequence[str], separator: str = " ") -> WordTokenizer:
    """One id per word: [PAD] 0, [MASK] 1, [EOS] 2, [BOS] 3, then `words`.

    Nothing is added on encoding, so `decode(encode(text)) == text` for every text whose
    words are in the vocabulary and separated by `separator`.

    Args:
        words: the vocabulary, in the order of its ids; no duplicates, no white space.
        separator: " " for words in a sentence, "" for letters in a word.

    Returns:
        A `PreTrainedTokenizerFast` with pad, mask, eos and bos tokens. Encoding a word
        outside the vocabulary raises a ValueError that names it.

    Raises:
        ValueError: no words, a repeated word, a word with white space, or a separator
            other than " " and "".

    Introduced in notebook 01.
    """
    check(separator in (" ", ""), "separator", separator, "' ' or ''")
    check(len(words) > 0, "words", words, "at least one word")
    vocabulary = {}
    for word in (*SPECIAL_TOKENS, *words):
        well_formed = len(word) == 1 if not separator else word.split() == [word]
        kind = "a word without white space" if separator else "one letter"
        if word not in SPECIAL_TOKENS:
            check(well_formed and not word.isspace(), "words", word, kind)
        check(word not in vocabulary, "words", word, "each word once, none special")
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary))
    if separator:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        backend.decoder = decoders.Fuse()
    names = dict(pad_token=PAD, mask_token=MASK, eos_token=EOS, bos_token=BOS)
    return WordTokenizer(tokenizer_object=backend, **names)
