"""Added tokens are found where the library `tokenizers` finds them, whichever file they stand in and are written to."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import gemma2
from gemma2 import BadModelFile, Tokenizer
from gemma2.checkpoints.gguf_tokenizer import AS_ADDED
from gemma2.checkpoints.tokenizer_json_write import tokenizer_json
from gemma2.checkpoints.vocabulary import tokenizer_of
from gemma2.convert import convert
from gemma2.load import POCKET
from gemma2.symbols import BLANK, _of_word
from tests.conftest import raw_config, tensors_of, tiny
from tests.test_vocabulary import Folder
from tests.tokenizer_files import older, pocket, token, write

Content = dict[str, Any]
PIECES = pocket()["model"]["vocab"]


def tokens(*texts: str, special: bool = False, **flags: bool) -> list[Content]:
    """Added tokens in the order of their ids. One that is a piece has that piece's."""
    new = [text for text in texts if text not in PIECES]
    return [token(PIECES[t] if t in PIECES else len(PIECES) + new.index(t), t, special, **flags) for t in texts]


CASES: dict[str, list[Content]] = {
    "a space, typed": tokens("foo bar"),
    "a space, normalized": tokens("foo bar", normalized=True),
    "a word with its space": tokens(" the", " they", normalized=True),
    "a word with its space, typed": tokens(" the"),
    "spaces": tokens("    ", " "),
    "spaces, normalized": tokens("     ", " ", normalized=True),
    "the sign for a space": tokens("▁the", "▁▁"),
    "Gemma's symbols inside": tokens("\n\nAnswer:", "<b>x", "x\n", "<start_of_turn>user", normalized=True),
    "Gemma's symbols inside a special one": tokens("\\n\\nAnswer:", "\\nA", special=True),
    "carriage returns": [*tokens("\r\n", normalized=True), token(len(PIECES) + 1, "\r", False)],
    "a typed one inside": [*tokens("abcdef", normalized=True), token(len(PIECES) + 1, "cde", False)],
    "a symbol that is normalized": tokens("\n\n", "\n\nX", normalized=True),
    "many that begin alike": tokens(*("-" * n for n in range(2, 80)), normalized=True),
    "lstrip": tokens("[MASK]", special=True, lstrip=True),
    "rstrip": tokens("[MASK]", "the", rstrip=True),
    "lstrip and rstrip, normalized": tokens("[MASK]", "a b", normalized=True, lstrip=True, rstrip=True),
    "Gemma's mask with lstrip": tokens("<mask>", special=True, lstrip=True),
    "single words": tokens("the", "foo", "é", "(b", single_word=True),
    "a single word, normalized": tokens("the", " foo", single_word=True, normalized=True),
    "a single word that holds others": [*tokens("they", single_word=True), token(PIECES["the"], "the", False)],
}
FILL = (
    *("a", "the", "there", " ", "  ", "    ", "\n", "\n\n", "\t", "\u2003", "\x1c", "_", "é", "1", "²", ".", "▁", "▁▁"),
    *("foo", "bar", " bar", "<b>", "x", "user", "God", "b", "c", "de", "<start_of_turn>", "\u0301", "\u200d", "\r"),
    *("-" * 3, "-" * 77),
)


def some(added: list[Content], count: int = 60) -> list[str]:
    source, own = random.Random(7), [each["content"] for each in added]
    parts = [[source.choice(own if source.random() < 0.4 else FILL) for _ in range(source.randrange(1, 12))]]
    while len(parts) < count:
        parts.append([source.choice(own if source.random() < 0.4 else FILL) for _ in range(source.randrange(1, 12))])
    return ["".join(part) for part in parts]


def with_tokens(added: list[Content]) -> Content:
    content = pocket()
    names = {each["content"] for each in added}
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] not in names] + added
    return content


def ids(found: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.encode(text, bos=False, special=True) for text in texts]


def of_library(content: Content | bytes, texts: list[str]) -> list[list[int]]:
    text = content.decode() if isinstance(content, bytes) else json.dumps(content)
    library = tokenizers.Tokenizer.from_str(text)
    return [library.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize("case", CASES)
def test_added_tokens_are_found_as_by_the_library_and_so_in_what_is_written(case: str, tmp_path: Path) -> None:
    added, texts = CASES[case], some(CASES[case])
    content = with_tokens(added)
    expected = of_library(content, texts)
    write(tmp_path, content)
    found = tokenizer_of(tmp_path)
    assert ids(found, texts) == expected
    written = tokenizer_json(found)
    assert written is not None and of_library(written, texts) == expected
    for text in texts:
        plain = found.encode(text, bos=False)
        if not any(each["lstrip"] or each["rstrip"] for each in added):
            assert found.decode(plain) == text.replace("▁", " ")
        assert not {each["id"] for each in added if each["special"]} & set(plain)
    # The same tokens beside a tokenizer.model, which cuts a typed ▁ as a space.
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    beside = {str(each["id"]): {key: value for key, value in each.items() if key != "id"} for each in added}
    write(tmp_path, {"added_tokens_decoder": beside}, "tokenizer_config.json")
    bare = [(text, wanted) for text, wanted in zip(texts, expected, strict=True) if "▁" not in text]
    assert ids(tokenizer_of(tmp_path), [text for text, _ in bare]) == [wanted for _, wanted in bare]


ODD = [*tokens(" the", "    ", "\n\nAnswer:", normalized=True), *[token(4099, "[MASK]", lstrip=True)]]


@pytest.mark.parametrize("name", ["out", "out.gguf", "out.ckpt"])
def test_what_convert_writes_reads_back_with_the_same_ids(name: str, folder: Folder, tmp_path: Path) -> None:
    place = folder("odd", tensors=tensors_of(tiny("2b", vocab_size=4100)))
    write(place, raw_config("2b", vocab_size=4100), "config.json")
    (place / "tokenizer.model").unlink()
    write(place, with_tokens(ODD))
    texts = [text for text in some(ODD) if "▁" not in text]  # which a GGUF cuts as a space, as SentencePiece does
    before = gemma2.load(place).tokenizer
    done = convert(place, tmp_path / name, progress=False)
    after = gemma2.load(done.path).tokenizer
    assert ids(after, texts) == ids(before, texts) == of_library(with_tokens(ODD), texts)
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    assert any(AS_ADDED in note and "llama.cpp may find them elsewhere" in note for note in done.notes) == (
        name == "out.gguf"
    )


def test_added_tokens_json_has_tokens_that_are_normalized(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    write(tmp_path, {"foo bar": 4096, " the": 4097}, "added_tokens.json")
    found = tokenizer_of(tmp_path)
    assert found.encode("a foo bar", bos=False) == [4040, 4036, 4096] and found.encode("a the")[2:] == [4097]


@pytest.mark.parametrize("added", [tokens("foo bar"), tokens("the"), tokens("<mask>", special=True, lstrip=True)])
def test_a_tokenizer_model_does_not_stand_in_for_a_tokenizer_json_with_other_tokens(
    added: list[Content], tmp_path: Path
) -> None:
    content = with_tokens(added)
    content["normalizer"] = {"type": "NFKC"}  # not Gemma's
    write(tmp_path, content)
    (tmp_path / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    with pytest.raises(BadModelFile, match=r"normalizer NFKC .* without that added token .* name it with tokenizer="):
        tokenizer_of(tmp_path)


def test_of_two_files_with_the_same_pieces_the_flags_in_tokenizer_json_hold(tmp_path: Path) -> None:
    content = with_tokens(tokens("<mask>", special=True, lstrip=True))
    write(tmp_path, older(content))
    (tmp_path / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    assert ids(tokenizer_of(tmp_path), ["a  <mask>"]) == of_library(content, ["a  <mask>"]) == [[4040, 4]]


def test_what_a_word_and_white_space_are_is_what_the_library_takes_for_them() -> None:
    library = {}
    for flag in ("single_word", "rstrip"):
        library[flag] = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
        library[flag].add_tokens([tokenizers.AddedToken("#", normalized=False, **{flag: True})])
    characters = [
        chr(c) for c in [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10000), *range(0x1F000, 0x1F200)]
    ]
    known = [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs") and c != "#"]
    for flag, ours in (("single_word", lambda c: not _of_word(c)), ("rstrip", lambda c: c in BLANK)):
        theirs = [each.ids for each in library[flag].encode_batch([f"#{c}" for c in known])]
        found = [each[:1] == [1] and (flag == "single_word" or len(each) == 1) for each in theirs]
        assert [hex(ord(c)) for c, there in zip(known, found, strict=True) if ours(c) != there] == [], sys.version
