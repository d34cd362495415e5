"""Tokenizers: ids in the stated order, exact round trips, no unknown words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlmlib.text import WordTokenizer, word_tokenizer

WORDS = ["the", "cat", "cats", "sleeps", "sleep", "."]
LETTERS = list("ACDLU")
words = word_tokenizer(WORDS)
letters = word_tokenizer(LETTERS, separator="")


def test_ids_are_specials_then_words():
    ids = words.convert_tokens_to_ids(["[PAD]", "[MASK]", "[EOS]", "[BOS]", *WORDS])
    assert ids == list(range(4 + len(WORDS)))
    names = ("pad", "mask", "eos", "bos")
    assert [getattr(words, f"{name}_token_id") for name in names] == [0, 1, 2, 3]
    assert isinstance(words, PreTrainedTokenizerFast)
    assert words.vocab_size == len(words) == 10


@given(st.lists(st.sampled_from([*WORDS, "[MASK]", "[EOS]", "[BOS]", "[PAD]"])))
def test_words_round_trip(tokens):
    text = " ".join(tokens)
    assert words.decode(words.encode(text)) == text
    assert words.tokenize(text) == tokens


@given(st.lists(st.sampled_from([*LETTERS, "[MASK]", "[EOS]"])))
def test_letters_round_trip(tokens):
    text = "".join(tokens)
    assert letters.decode(letters.encode(text)) == text
    assert letters.tokenize(text) == tokens


def test_decoding_can_leave_out_special_tokens():
    ids = words.encode("[BOS] the cat [MASK] . [EOS] [EOS]")
    assert words.decode(ids, skip_special_tokens=True) == "the cat ."
    assert letters.decode(letters.encode("CLA[MASK]D"), skip_special_tokens=True) == (
        "CLAD"
    )


def test_padding_is_transformers_own():
    batch = words(["the cat", "the cat sleeps ."], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[4, 5, 0, 0], [4, 5, 7, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("tokenizer", "text", "word"),
    [
        (words, "the zebra [MASK] yawns", "'zebra'"),
        (words, ["the cat", "[BOS] a cat"], "'a'"),
        (words, "the Cat", "'Cat'"),
        (words, "cat.", "'cat.'"),
        (letters, "CLA[MASK]Z", "'Z'"),
        (letters, "CL AU", "' '"),
    ],
)
def test_an_unknown_word_is_named(tokenizer, text, word):
    with pytest.raises(ValueError, match=word):
        tokenizer(text)
    if isinstance(text, str):
        with pytest.raises(ValueError, match="of the vocabulary"):
            tokenizer.encode(text)
        with pytest.raises(ValueError, match="of the vocabulary"):
            tokenizer.tokenize(text)


def test_other_errors_keep_their_cause():
    with pytest.raises(ValueError, match="PaddingStrategy"):
        words("the cat", padding="sideways")
    with pytest.raises(ValueError, match="must be of type `str`"):
        words(5)


def test_unknown_words_lists_all_in_order():
    assert words.unknown_words(["the zebra", "[MASK] yawns"]) == ["zebra", "yawns"]
    assert words.unknown_words("the cats sleep . [EOS]") == []


@pytest.mark.parametrize("tokenizer", [words, letters])
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    ids = list(range(len(tokenizer)))
    for loader in (WordTokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.mask_token_id == 1
        assert loaded.decode(ids) == tokenizer.decode(ids)
        assert loaded.encode(loaded.decode(ids)) == ids
    with pytest.raises(ValueError, match=r"word='\?'"):
        WordTokenizer.from_pretrained(tmp_path)("?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "words="),
        ((["cat", "cat"],), "words='cat'"),
        ((["the cat"],), "words='the cat'"),
        ((["cat", ""],), "words=''"),
        ((["[MASK]"],), r"words='\[MASK\]'"),
        ((["cat"], "-"), "separator='-'"),
        ((["A", "BC"], ""), "words='BC'"),
        ((["A", " "], ""), "words=' '"),
    ],
)
def test_wrong_vocabularies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        word_tokenizer(*arguments)
