"""Long and odd text through the tokenizer: what comes back is what went in, and text never becomes a control id."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemma2 import Tokenizer
from gemma2.load import POCKET
from gemma2.tokenizer import CONTROL

pytestmark = pytest.mark.filterwarnings("ignore:the text begins with <bos>")
SPACE = "\u2581"  # SentencePiece's own sign for a space: the one character that does not come back as itself
WORDS = Tokenizer.from_file(POCKET / "tokenizer.model")
STEERING = {i for i in range(len(WORDS)) if CONTROL.fullmatch(WORDS._pieces.id_to_piece(i))} | set(range(4))
SPELLINGS = sorted(WORDS._pieces.id_to_piece(i) for i in STEERING)
BYTE = {byte: WORDS._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)}


def comes_back(text: str) -> None:
    ids = WORDS.encode(text)
    assert ids[0] == WORDS.special["bos"] and not STEERING & set(ids[1:])
    assert WORDS.decode(ids) == text.replace(SPACE, " ")
    assert WORDS.encode(text, bos=False) == ids[1:]


def test_the_vocabulary_has_the_spellings_that_these_tests_are_about() -> None:
    assert len(SPELLINGS) == 4 + 3 + 99 + 2
    assert {"<bos>", "<mask>", "<unused0>", "<start_of_turn>", "[@BOS@]"} < set(SPELLINGS)


@given(st.text())
@example(f"{SPACE} {SPACE}{SPACE}")
@example("\r\n\t\v\f\x00\x85\u2028\ufeff\ufffe\uffff\U0010ffff")
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    comes_back(text)


@given(
    st.lists(st.sampled_from([*SPELLINGS, "<", ">", "_of_turn>", "<start", "[", "@", " ", "\n", "<0x41>", "日", "x"]))
)
@settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_text_around_control_spellings_comes_back_and_steers_nothing(parts: list[str]) -> None:
    comes_back("".join(parts))


def test_control_spellings_become_control_ids_only_when_asked() -> None:
    for spelling in SPELLINGS:
        for text in (spelling, f"a{spelling}b", spelling * 3, f"<{spelling}>", spelling.upper(), f" {spelling}\n"):
            comes_back(text)
    assert [WORDS.encode(spelling, bos=False, special=True) for spelling in SPELLINGS] == [
        [WORDS.id_of(spelling)] for spelling in SPELLINGS
    ]


def test_every_plane_of_unicode_comes_back() -> None:
    for plane in range(17):
        points = range(plane * 0x10000, (plane + 1) * 0x10000, 61)
        text = "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)
        comes_back(text)
    for edge in (0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFD, 0xFFFF, 0x10000, 0x10FFFF):
        comes_back(chr(edge))
        comes_back(f"a{chr(edge)}{chr(edge)} ")


def test_all_256_bytes_have_a_piece_and_spell_any_utf8() -> None:
    for byte, token in BYTE.items():
        assert WORDS.decode([token]) == (chr(byte) if byte < 0x80 else "\ufffd")
    text = "é日🙂\0 x"
    assert WORDS.decode([BYTE[byte] for byte in text.encode()]) == text


def test_bytes_that_are_not_utf8_decode_to_replacement_characters() -> None:
    rng = random.Random(0)
    for _ in range(300):
        raw = rng.randbytes(rng.randrange(1, 12))
        decoded = WORDS.decode([BYTE[byte] for byte in raw])
        assert decoded.encode().decode() == decoded
        kept = raw.decode(errors="ignore")
        assert [c for c in decoded if c != "\ufffd"] == [c for c in kept if c != "\ufffd"]


def test_every_id_decodes_alone_and_together() -> None:
    for i in range(len(WORDS)):
        assert isinstance(WORDS.decode([i]), str)
    assert len(WORDS.decode(range(len(WORDS)))) > len(WORDS)


ALICE = "Curiouser and curiouser, said Alice; 'tis 1865. "
LONG = {
    "one letter": "a" * 10**6,
    "spaces": " " * 10**6,
    "newlines": "\n" * 10**6,
    "words": ALICE * (10**6 // len(ALICE)),
    "three-byte characters": "日本語" * 111_111,
    "four-byte characters": "🙂" * 250_000,
    "NULs": "\0" * 10**6,
    "control spellings": "<start_of_turn>" * 66_666,
    "the beginnings of control spellings": "<start_of_turn" * 71_428,
    "brackets": "<" * 10**6,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_of_text_takes_a_moment(kind: str) -> None:
    text = LONG[kind]
    started = time.process_time()  # of this process: another's load does not count
    ids = WORDS.encode(text)
    assert time.process_time() - started <= 2
    assert WORDS.decode(ids) == text
    assert not STEERING & set(ids[1:])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udcff", "\ud83d", "🙂\ud83d\ude42", "x" * 10_000 + "\udc80"])
def test_lone_surrogates_are_refused_with_their_place(text: str) -> None:
    place = re.search("[\ud800-\udfff]", text)
    assert place is not None
    with pytest.raises(ValueError, match=rf"^text is not valid UTF-8: lone surrogate at character {place.start()}$"):
        WORDS.encode(text)
