"""Bytes and tokenizer files, and how many bytes each token stands for."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from dilated_models.text.files import Piece, text_files
from dilated_models.text.pieces import text_pieces
from dilated_models.text.streams import ByteStream
from dilated_models.text.vocabulary import ByteVocabulary, TokenizerVocabulary, token_cache
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel


@pytest.fixture
def byte_level(tmp_path: Path, text: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in sorted(text.glob("*.py"))], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer that drops whitespace."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


def test_bytes_there_and_back():
    vocabulary = ByteVocabulary()
    assert vocabulary.num_tokens == 256
    assert vocabulary.decode(vocabulary.encode("naïve 🙂")) == "naïve 🙂"
    assert vocabulary.encode("\udcff") == [255]
    assert vocabulary.decode([65, 255]) == "A\ufffd"


def test_byte_lengths_of_a_byte_level_tokenizer_add_up(byte_level: Path):
    vocabulary = TokenizerVocabulary(byte_level)
    for sample in ("def f(x):\n    return x\n", "naïve 🙂🙂 ünïcödé", " ", "日本語"):
        ids, lengths = vocabulary.encode_with_byte_lengths(sample)
        assert vocabulary.decode(ids.tolist()) == sample
        assert lengths.sum() == len(sample.encode())
        assert len(ids) == len(lengths)
    ids, lengths = vocabulary.encode_with_byte_lengths("return x")
    assert [len(vocabulary.decode([i])) for i in ids.tolist()] == lengths.tolist()


def test_dropped_whitespace_is_charged_to_its_neighbours(words: Path):
    _, lengths = TokenizerVocabulary(words).encode_with_byte_lengths("  one   two\n")
    assert lengths.tolist() == [8, 4]


def test_the_cache_holds_the_tokens_of_the_text(byte_level: Path, text: Path, tmp_path: Path):
    pieces, _ = text_files([text])
    vocabulary = TokenizerVocabulary(byte_level)
    stream = ByteStream(pieces)
    cached = token_cache(stream, pieces, vocabulary, tmp_path / "cache")
    expected = [i for p in pieces for i in vocabulary.encode(p.path.read_text())]
    assert cached.read(0, len(cached)).tolist() == expected
    assert cached.byte_lengths(0, len(cached)).sum() == len(stream)
    assert cached.byte_lengths(0, len(cached)).min() >= 1
    whole = stream.text_of(0, len(stream))
    assert cached.text_of(0, len(cached)) == whole
    assert cached.text_of(7, 20).decode() == vocabulary.decode(expected[7:20])
    sizes = [len(vocabulary.encode(p.path.read_text())) for p in pieces]
    starts = cached.document_starts(0, len(cached)).tolist()
    assert starts == [0, *itertools.accumulate(sizes[:-1])]
    for piece, start in zip(pieces, starts, strict=True):
        assert cached.place_of(start) == (piece.path, 0)
    in_front = sum(map(len, map(vocabulary.decode, [expected[:7]])))
    assert cached.place_of(7) == stream.place_of(in_front)
    files = sorted((tmp_path / "cache").iterdir())
    assert [f.suffix for f in files] == [".u32", ".i64", ".u16"]
    assert files[2].stat().st_size == 2 * len(expected)


def test_the_cache_is_made_once_per_text(byte_level, text, tmp_path, monkeypatch):
    pieces, _ = text_files([text])
    vocabulary = TokenizerVocabulary(byte_level)
    encoded = []
    real = TokenizerVocabulary.encode_with_byte_lengths
    monkeypatch.setattr(
        TokenizerVocabulary,
        "encode_with_byte_lengths",
        lambda self, part: encoded.append(part) or real(self, part),
    )
    for _ in range(2):
        token_cache(ByteStream(pieces), pieces, vocabulary, tmp_path / "cache")
    assert len(encoded) == 30
    (text / "file1.py").write_text("changed")
    pieces, _ = text_files([text])
    token_cache(ByteStream(pieces), pieces, vocabulary, tmp_path / "cache")
    assert len(encoded) == 60


def test_long_files_are_tokenised_in_parts(byte_level, tmp_path, monkeypatch):
    monkeypatch.setattr("dilated_models.text.vocabulary._PART_BYTES", 10)
    content = "ab 🙂\n" * 20 + "🙂" * 20  # the end has no line break to cut at
    (tmp_path / "long.txt").write_text(content)
    pieces = [Piece(tmp_path / "long.txt", "long.txt", 0, len(content.encode()))]
    vocabulary = TokenizerVocabulary(byte_level)
    cached = token_cache(ByteStream(pieces), pieces, vocabulary, tmp_path / "cache")
    assert vocabulary.decode(cached.read(0, len(cached)).tolist()) == content
    assert cached.byte_lengths(0, len(cached)).sum() == len(content.encode())


def test_bytes_without_tokens_are_charged_too(words: Path, tmp_path: Path):
    pieces = []
    for name, content in (("a", "  \n"), ("b", "one two "), ("c", " \n \n"), ("d", " two")):
        (tmp_path / name).write_text(content)
        pieces.append(Piece(tmp_path / name, name, 0, len(content)))
    cached = token_cache(ByteStream(pieces), pieces, TokenizerVocabulary(words), tmp_path / "cache")
    assert cached.read(0, 9).tolist() == [1, 2, 2]
    assert cached.byte_lengths(0, 9).tolist() == [3 + 4, 4 + 4, 4]
    assert cached.document_starts(0, 3).tolist() == [0, 2]  # of "b" and "d", which have tokens


def test_a_failed_tokenisation_leaves_no_cache(words: Path, tmp_path: Path):
    (tmp_path / "blank").write_text("   \n")
    pieces = [Piece(tmp_path / "blank", "blank", 0, 4)]
    with pytest.raises(ValueError, match="the tokenizer finds 0 tokens in the text; it must"):
        token_cache(ByteStream(pieces), pieces, TokenizerVocabulary(words), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_refusals(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer file '.*none.json'"):
        TokenizerVocabulary(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'.*bad.json' is not a tokenizer file: .*; give a"):
        TokenizerVocabulary(tmp_path / "bad.json")
    Tokenizer(models.BPE()).save(str(tmp_path / "untrained.json"))
    with pytest.raises(ValueError, match="has 0 tokens; it must have at least 1, so train it"):
        TokenizerVocabulary(tmp_path / "untrained.json")
    assert np.iinfo(np.uint16).max == 65535


@pytest.mark.parametrize("prompt", ["", "def f", "naïve 🙂"])
def test_pieces_of_a_tokenizer_add_up_to_its_text(byte_level, prompt):
    """Whatever tokens follow; no piece cuts a character of the text."""
    vocabulary = TokenizerVocabulary(byte_level)
    before = vocabulary.encode(prompt)
    tokens = [*vocabulary.encode("(x):\n    return 'é🙂🙂'"), *range(200, 40, -1), *before, 3]
    pieces = list(text_pieces(vocabulary, before, tokens))
    whole = vocabulary.decode([*before, *tokens]).encode()
    assert prompt.encode() + b"".join(pieces) == whole
    assert "🙂".encode() in pieces  # three tokens, one piece
    assert len(pieces) > len(tokens) / 3


def test_pieces_keep_the_spaces_between_words(words):
    vocabulary = TokenizerVocabulary(words)
    pieces = list(text_pieces(vocabulary, [1], [2, 1, 2]))
    assert (
        b"one" + b"".join(pieces) == vocabulary.decode([1, 2, 1, 2]).encode() == b"one two one two"
    )


def test_bytes_that_are_no_text_are_encoded(byte_level):
    vocabulary = TokenizerVocabulary(byte_level)
    assert vocabulary.decode(vocabulary.encode("a\udcffb")) == "a\ufffdb"
