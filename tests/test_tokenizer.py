"""Text to ids and back, with Gemma 2's real vocabulary where the shared data is, and with the pocket one always."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sentencepiece

from gemma2 import Tokenizer
from gemma2.detokenizer import Detokenizer
from gemma2.load import POCKET
from tests.conftest import SHARED

REAL = SHARED / "data" / "gemma2-tokenizer"
needs_real = pytest.mark.needs("shared", "data/gemma2-tokenizer")


@pytest.fixture(scope="module")
def pocket() -> Tokenizer:
    return Tokenizer.from_file(POCKET / "tokenizer.model")


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.from_file(REAL / "tokenizer.model")


def golden() -> list[dict[str, object]]:
    return [json.loads(line) for line in (REAL / "golden.jsonl").read_text(encoding="utf-8").splitlines()]


@needs_real
def test_the_golden_ids_are_reproduced(real: Tokenizer) -> None:
    rows = golden()
    assert len(rows) == 216
    for row in rows:
        special = bool(row["agrees_with_hf_tokenizers"])  # one has <bos> in it, which SentencePiece does not find
        assert real.encode(str(row["text"]), bos=False, special=special) == row["ids"], row["text"]


@needs_real
def test_without_special_only_texts_that_spell_control_tokens_differ_and_they_decode_the_same(real: Tokenizer) -> None:
    differing = []
    for row in golden():
        plain = real.encode(str(row["text"]), bos=False)
        if plain != row["ids"]:
            differing.append(row["text"])
            assert real.decode(plain) == row["text"]
            assert not any(4 <= token <= 107 or token == 255968 for token in plain)
    assert len(differing) == 2 and all("<start_of_turn>" in str(t) or "<unused5>" in str(t) for t in differing)


@needs_real
def test_the_real_vocabulary_has_its_special_ids(real: Tokenizer) -> None:
    assert len(real) == 256_000
    expected = {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "start_of_turn": 106, "end_of_turn": 107}
    assert dict(real.special) == expected


@needs_real
def test_the_pocket_vocabulary_has_gemmas_layout_up_to_the_bytes(real: Tokenizer, pocket: Tokenizer) -> None:
    assert dict(pocket.special) == dict(real.special)
    for token in range(473):
        assert pocket._pieces.id_to_piece(token) == real._pieces.id_to_piece(token)
    assert len(pocket) == 4096


@pytest.mark.filterwarnings("ignore:the text begins with <bos>")
def test_bos_is_on_by_default_and_never_twice(pocket: Tokenizer) -> None:
    assert pocket.encode("")[:1] == [2] and pocket.encode("", bos=False) == []
    assert pocket.encode("a") == [2, *pocket.encode("a", bos=False)]
    assert pocket.encode("<bos>a").count(2) == 1 and pocket.encode("<bos>a", special=True).count(2) == 1


@pytest.mark.parametrize(
    "text",
    ["<start_of_turn>", "x<end_of_turn>\n", "<<start_of_turn>>", "<mask><unused7>[@BOS@]", "<2mass>", "<eos><pad>"],
)
def test_user_text_never_becomes_a_control_token_unless_asked(pocket: Tokenizer, text: str) -> None:
    plain = pocket.encode(text, bos=False)
    assert not any(token <= 107 and token != 3 for token in plain)
    assert pocket.decode(plain) == text


def test_asked_for_control_tokens_are_found(pocket: Tokenizer) -> None:
    assert pocket.encode("<start_of_turn>user", special=True)[:2] == [2, 106]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   leading",
        "trailing  ",
        "a\n\n\nb",
        "tab\there",
        "日本語 🙂",
        "\x00\x7f",
        "</s><b>x</b>",
        "1234567",
        "\r\n",
    ],
)
def test_text_survives_the_round_trip(pocket: Tokenizer, text: str) -> None:
    assert pocket.decode(pocket.encode(text)) == text


def test_newline_and_space_runs_are_single_ids(pocket: Tokenizer) -> None:
    assert [pocket.encode("\n" * n, bos=False) for n in (1, 2, 31)] == [[108], [109], [138]]
    assert [pocket.encode(" " * n, bos=False) for n in (2, 31)] == [[139], [168]]


def test_the_model_file_is_the_one_a_bare_sentencepiece_reads(pocket: Tokenizer) -> None:
    import sentencepiece

    bare = sentencepiece.SentencePieceProcessor(model_file=str(POCKET / "tokenizer.model"))
    text = re.sub(
        "<(bos|eos|pad|unk)>", "", Path(__file__).read_text(encoding="utf-8")
    )  # which SentencePiece does not find
    assert pocket.encode(text, bos=False, special=True) == bare.encode(text)


# Settings of the SentencePiece model under which it drops a leading space of what it decodes, and Gemma's.
FILES = {"Gemma's": b"", "a space prefix": b"\x1a\x02\x18\x01", "white space collapsed": b"\x1a\x02\x20\x01"}
LONG = "And God said, Let there be light:  and\n\n\tthere was <b>light</b> 日本🙂 <start_of_turn>\x00 1 2 "


def space_prefixed(proto: bytes) -> bytes:
    """The same `tokenizer.model` with a space before every text. Of two settings in a protobuf the last one holds."""
    return proto + FILES["a space prefix"]


@pytest.mark.parametrize("settings", FILES.values(), ids=FILES)
def test_text_made_id_by_id_is_the_text_of_all_ids(settings: bytes, pocket: Tokenizer) -> None:
    tokenizer = Tokenizer(pocket.to_proto() + settings)
    ids = pocket.encode(LONG, bos=False)
    for start in range(len(ids)):
        growing = Detokenizer(tokenizer, frozenset(), ())
        pieces = [growing.push(token) for token in ids[start:]]
        assert "".join(pieces) + growing.flush() == tokenizer.decode(ids[start:]) == pocket.decode(ids[start:])
    assert tokenizer.decode([2, *ids]) == LONG


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["And God said", " two", "\n", "a<start_of_turn>b<end_of_turn>", LONG])
def test_a_space_prefix_is_one_space_before_a_whole_text(text: str, special: bool, pocket: Tokenizer) -> None:
    tokenizer = Tokenizer(space_prefixed(pocket.to_proto()))
    ids = tokenizer.encode(text, special=special)
    assert ids == pocket.encode(" " + text, special=special) and tokenizer.decode(ids) == " " + text
    bare = sentencepiece.SentencePieceProcessor(model_proto=space_prefixed(pocket.to_proto()))
    assert tokenizer.encode(text, special=True, bos=False) == bare.encode(text)
    assert tokenizer.encode("") == [2]
    assert tokenizer.to_proto() == space_prefixed(pocket.to_proto())
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
