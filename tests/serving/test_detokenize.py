"""Text from tokens as they arrive: all pieces together are the text, and no piece ends inside a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus.serving.detokenize import REPLACEMENT, Detokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the hardest case, every non-ASCII character is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that drops the first space of whatever it decodes."""
    words = ["\u2581the", "\u2581cat", "s", "\u2581", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES = byte_tokenizer()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_pieces_make_the_text_and_none_is_half_a_character(text: str, sizes: list[int]):
    ids = BYTES(text)["input_ids"]
    stream, pieces, start = Detokenizer(BYTES), [], 0
    for turn in range(len(ids)):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    assert "".join(pieces) + stream.flush() == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces), "half a character was printed"


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=24))
def test_bytes_that_are_no_text_end_like_the_whole_decoded(raw: bytes):
    alphabet = {bytes([i]): BYTES.convert_tokens_to_ids(BYTES.tokenize(chr(i))) for i in range(128)}
    ids = [alphabet[bytes([b])][0] if b < 128 else b % BYTES.vocab_size for b in raw]
    stream = Detokenizer(BYTES)
    pieces = [stream.push([token_id]) for token_id in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)


def test_text_before_half_a_character_is_not_held_back():
    ids = BYTES("abc\u00e9")["input_ids"]
    stream = Detokenizer(BYTES)
    assert stream.push(ids[:-1]) == "abc"
    assert stream.push(ids[-1:]) == "\u00e9"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_first_space_of_a_piece_survives(size: int):
    tokenizer, ids = word_tokenizer(), [0, 1, 2, 0, 1]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == "the cats the cat"
