"""The tokenizer of a GGUF is that of the tokenizer.model it was made from, whichever way the file was made."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import parity_model
import pytest
import sentencepiece

from gemma2 import BadModelFile, Tokenizer
from gemma2.chat import chat_ids
from gemma2.checkpoints.gguf import GGUF, Value, read_header
from gemma2.checkpoints.gguf_tokenizer import (
    build_tokenizer,
    chat_tuned,
    end_ids,
    notes,
    tokenizer_model,
)
from gemma2.checkpoints.gguf_tokenizer_write import tokenizer_metadata
from gemma2.checkpoints.sentencepiece_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_proto,
)
from gemma2.load import POCKET
from gemma2.symbols import SPACE
from tests.chat_templates import GEMMA
from tests.conftest import SHARED
from tests.parity.recordings import PARITY, WRITTEN

REAL = SHARED / "data" / "gemma2-tokenizer"
needs_real = pytest.mark.needs("shared", "data/gemma2-tokenizer")
OFFICIAL = ("vocab-official.gguf", "vocab-no-tokenizer-config.gguf")
POCKET_PROTO = (POCKET / "tokenizer.model").read_bytes()
SYMBOLS = range(4, 217)  # of Gemma 2's 256,000 pieces and of the pocket model's 4,096: what no merge makes
STEER = {"<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(100)), "<start_of_turn>", "<end_of_turn>"}


@pytest.fixture(scope="module")
def pocket() -> Tokenizer:
    return Tokenizer(POCKET_PROTO)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer.from_file(REAL / "tokenizer.model")


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request: pytest.FixtureRequest) -> GGUF:
    return read_header(REAL / request.param)


# What llama.cpp's converter does (conversion/base.py, _create_vocab_sentencepiece), for the pocket model's vocabulary.


def plain_arrays() -> dict[str, list[Any]]:
    """Without a tokenizer_config.json: SentencePiece's user-defined symbols come out NORMAL."""
    model = sentencepiece.SentencePieceProcessor(model_proto=POCKET_PROTO)
    tokens = [model.id_to_piece(i) for i in range(model.vocab_size())]
    scores = [model.get_score(i) for i in range(model.vocab_size())]
    kinds = [
        UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else BYTE if model.is_byte(i) else NORMAL
        for i in range(model.vocab_size())
    ]
    return {"tokens": tokens, "scores": scores, "token_type": kinds}


def configured_arrays() -> dict[str, list[Any]]:
    """With Gemma 2's tokenizer_config.json: what steers is CONTROL, the rest USER_DEFINED with bare spaces."""
    arrays = plain_arrays()
    for i in [*range(4), *SYMBOLS]:
        steers = i < 4 or arrays["tokens"][i] in STEER
        arrays["token_type"][i] = CONTROL if steers else USER_DEFINED
        arrays["tokens"][i] = arrays["tokens"][i] if steers else arrays["tokens"][i].replace(SPACE, " ")
        arrays["scores"][i] = -1000.0
    return arrays


STYLES = {"plain": plain_arrays, "configured": configured_arrays}


@pytest.fixture(params=STYLES)
def arrays(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    return STYLES[request.param]()


def header(arrays: dict[str, list[Any]], **changes: Value | None) -> GGUF:
    """A GGUF's header with these arrays and what else the converter states; a change to None leaves a key out."""
    keys: dict[str, Value | None] = {
        "model": Value("str", "llama"),
        "tokens": Value("str[]", arrays["tokens"]),
        "scores": Value("f32[]", np.array(arrays["scores"], np.float32)),
        "token_type": Value("i32[]", np.array(arrays["token_type"], np.int32)),
        "bos_token_id": Value("u32", 2),
        "eos_token_id": Value("u32", 1),
        "padding_token_id": Value("u32", 0),
        "add_bos_token": Value("bool", True),
        "add_space_prefix": Value("bool", False),
        **changes,
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in keys.items() if value is not None}
    return GGUF(Path("model.gguf"), 3, 32, metadata, {}, 0)


def changed(arrays: dict[str, list[Any]], kinds: dict[int, int] | None = None, **add: Any) -> dict[str, list[Any]]:
    """A copy of `arrays` with other types, and with what `add` puts at the end: a token's text to score and type."""
    copy = {name: list(values) for name, values in arrays.items()}
    for i, kind in (kinds or {}).items():
        copy["token_type"][i] = kind
    for token, score, kind in add.get("more", []):
        copy["tokens"].append(token)
        copy["scores"].append(score)
        copy["token_type"].append(kind)
    return copy


def texts(seed: int, count: int) -> list[str]:
    """Random text out of what tokenizers get wrong."""
    source = random.Random(seed)
    pieces = [
        *(
            "in the beginning",
            "And God said, Let there be light",
            "thou shalt",
            "The",
            "\u017f",
            "é",
            "日本語",
            "🙂",
            "\u200d",
        ),
        *(" " * n for n in (1, 2, 3, 15, 16, 17, 31, 32, 40)),
        *("\t" * n for n in (1, 2, 3, 31, 32)),
        *("\n" * n for n in (1, 2, 5, 31, 33)),
        *(
            "<table>",
            "</table>",
            "<s>",
            "</s>",
            "<b>",
            "</h6>",
            "<code>",
            "<tab",
            "</",
            "<p>",
            "<unk>",
            "<bos>",
            "<eos>",
        ),
        *(
            "<start_of_turn>",
            "<end_of_turn>",
            "<mask>",
            "<2mass>",
            "[@BOS@]",
            "<unused0>",
            "<unused99>",
            "[toxicity=0]",
        ),
        *("<0x41>", "▁", "▁▁", "\r\n", "\x00", "\x7f", "1234567890", "3.14", "'s", "!!", "​", "ﬁ", "Å"),
    ]

    def part() -> str:
        return chr(source.choice((32, 160, 0x3000, source.randrange(0x20, 0xD800), source.randrange(0xE000, 0x110000))))

    return [
        "".join(source.choice(pieces) if source.random() < 0.8 else part() for _ in range(source.randrange(1, 12)))
        for _ in range(count)
    ]


def assert_same(found: Tokenizer, expected: Tokenizer, some: Iterable[str]) -> None:
    assert len(found) >= len(expected) and dict(found.special) == dict(expected.special)
    for text in some:
        for special in (False, True):
            ids = expected.encode(text, special=special)
            assert found.encode(text, special=special) == ids, (text, special)
            assert found.decode(ids) == expected.decode(ids)
            for end in range(len(ids)):
                assert found.pending_bytes(ids[:end]) == expected.pending_bytes(ids[:end])


def kinds_of(found: GGUF) -> list[int]:
    kinds: list[int] = read_proto(tokenizer_model(found), "rebuilt").kinds.tolist()
    return kinds


# Files of llama.cpp's own converter, from Gemma 2's 256,000 pieces.


@needs_real
def test_both_official_files_give_the_golden_ids(official: GGUF) -> None:
    rebuilt = build_tokenizer(official)
    rows = [json.loads(line) for line in (REAL / "golden.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 216
    for row in rows:
        special = row["agrees_with_hf_tokenizers"]  # one has <bos> in it, which SentencePiece does not find
        assert rebuilt.encode(row["text"], bos=False, special=special) == row["ids"], row["text"]
        assert rebuilt.decode(row["ids"]) == row["text"]


@needs_real
def test_both_official_files_tokenize_random_text_as_the_model_file_does(official: GGUF, real: Tokenizer) -> None:
    assert_same(build_tokenizer(official), real, texts(0, 600))


@needs_real
def test_the_model_file_comes_out_of_both_official_files_byte_for_byte(official: GGUF) -> None:
    assert tokenizer_model(official) == (REAL / "tokenizer.model").read_bytes()


@needs_real
def test_the_metadata_of_the_model_file_are_those_of_the_official_file_in_the_same_order() -> None:
    stated = {
        key: value
        for key, value in read_header(REAL / OFFICIAL[0]).metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    made = tokenizer_metadata((REAL / "tokenizer.model").read_bytes())
    assert list(made) == list(stated)
    for key, value in stated.items():
        assert made[key].type == value.type and np.array_equal(made[key].value, value.value), key


@pytest.mark.parametrize("name", WRITTEN)
def test_a_model_file_with_weights_gives_the_pieces_and_ids_of_its_tokenizer(name: str) -> None:
    proto = parity_model.tokenizer_model()
    rebuilt = read_header(PARITY / f"{name}.gguf")
    made, given = read_proto(tokenizer_model(rebuilt), "made"), read_proto(proto, "given")
    assert made.pieces == given.pieces and np.array_equal(made.kinds, given.kinds)
    assert np.array_equal(made.scores, given.scores)
    assert_same(build_tokenizer(rebuilt), Tokenizer(proto), texts(1, 100))


# The five traps of reading a GGUF's vocabulary.


def test_trap_1_space_runs_with_bare_spaces_are_one_id_each(pocket: Tokenizer) -> None:
    arrays = configured_arrays()
    assert arrays["tokens"][139:141] == ["  ", "   "]
    rebuilt = build_tokenizer(header(arrays))
    assert [rebuilt.encode(" " * n, bos=False) for n in range(2, 32)] == [[137 + n] for n in range(2, 32)]
    assert rebuilt.decode([139]) == "  "
    assert_same(rebuilt, pocket, texts(2, 100))


def test_trap_2_pieces_that_steer_are_found_in_text_although_the_file_calls_them_control(pocket: Tokenizer) -> None:
    arrays = configured_arrays()
    assert {arrays["token_type"][i] for i in range(4, 108)} == {CONTROL}
    found = header(arrays)
    assert build_tokenizer(found).encode("<start_of_turn>user", special=True)[:2] == [2, 106]
    assert build_tokenizer(found).decode([106, 4]) == "<start_of_turn><mask>"
    assert kinds_of(found)[:4] == [CONTROL, CONTROL, CONTROL, UNKNOWN]
    assert set(kinds_of(found)[4:217]) == {USER_DEFINED}
    assert_same(build_tokenizer(found), pocket, texts(3, 100))


def test_trap_3_scores_of_minus_1000_are_no_merges_and_the_merge_that_has_that_score_stays_one(
    pocket: Tokenizer,
) -> None:
    arrays = configured_arrays()
    (merge,) = (i for i in range(217, 4096) if arrays["scores"][i] == -1000.0)
    rebuilt = read_proto(tokenizer_model(header(arrays)), "rebuilt")
    assert rebuilt.kinds[merge] == NORMAL and rebuilt.scores[merge] == -1000.0
    assert set(rebuilt.scores[:473].tolist()) == {0.0} and np.array_equal(rebuilt.scores[473:], -np.arange(4096 - 473))
    arrays["scores"] = [score - 5000.0 if i >= 473 else score for i, score in enumerate(arrays["scores"])]
    assert_same(build_tokenizer(header(arrays)), pocket, texts(4, 100))  # the order alone counts


def test_trap_4_symbols_that_the_file_calls_normal_are_found_by_place_and_spelling(pocket: Tokenizer) -> None:
    arrays = plain_arrays()
    assert {arrays["token_type"][i] for i in SYMBOLS} == {NORMAL}
    assert set(kinds_of(header(arrays))[4:217]) == {USER_DEFINED}
    assert_same(build_tokenizer(header(arrays)), pocket, texts(5, 100))
    # Gemma 2 has some behind all merges as well, where only the spelling tells.
    behind = [
        ("[toxicity=0]", 0.0, NORMAL),
        ("\t\t", 0.0, NORMAL),
        ("\t\t\t", 0.0, NORMAL),
        ("<unused99>", 0.0, NORMAL),
    ]
    found = header(changed(arrays, more=behind))
    assert kinds_of(found)[473] == NORMAL and kinds_of(found)[4096:] == [USER_DEFINED] * 4
    rebuilt = build_tokenizer(found)
    assert rebuilt.encode("\t\t\t<unused99>[toxicity=0]\t\t", bos=False, special=True) == [4098, 4099, 4096, 4097]


def test_trap_4_a_file_from_before_july_2024_gives_the_same_ids(pocket: Tokenizer) -> None:
    arrays, configured = plain_arrays(), configured_arrays()
    for i in (0, 1, 2, 3, 106, 107):  # all that the tokenizer_config.json of the time had
        for name in arrays:
            arrays[name][i] = configured[name][i]
    assert_same(build_tokenizer(header(arrays)), pocket, texts(6, 100))


def test_trap_5_space_runs_as_sentencepiece_writes_them_and_user_defined_types_are_taken_too(pocket: Tokenizer) -> None:
    arrays = changed(plain_arrays(), dict.fromkeys(SYMBOLS, USER_DEFINED))
    assert arrays["tokens"][139] == SPACE * 2 and set(arrays["scores"][4:217]) == {0.0}
    assert set(kinds_of(header(arrays))[4:217]) == {USER_DEFINED}
    assert_same(build_tokenizer(header(arrays)), pocket, texts(7, 100))


def test_the_types_that_a_file_gives_gemmas_own_symbols_never_matter(pocket: Tokenizer) -> None:
    source = random.Random(8)
    for trial in range(12):
        arrays = plain_arrays()
        for i in SYMBOLS:
            arrays["token_type"][i] = source.choice((NORMAL, CONTROL, USER_DEFINED))
            arrays["scores"][i] = source.choice((0.0, -1000.0))
            arrays["tokens"][i] = arrays["tokens"][i].replace(SPACE, source.choice((" ", SPACE)))
        assert_same(build_tokenizer(header(arrays)), pocket, texts(100 + trial, 25))


# Vocabularies that are no longer Google's.


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_the_html_tag_of_llamas_end_is_text_and_ends_nothing(kind: int, pocket: Tokenizer) -> None:
    found = header(changed(plain_arrays(), {213: kind}))
    rebuilt = build_tokenizer(found)
    assert rebuilt.encode("a</s>b", bos=False)[1] == 213 and rebuilt.decode([213]) == "</s>"
    assert 213 not in rebuilt.special.values() and chat_tuned(found) is None


def test_control_pieces_that_gemma_does_not_have_are_read_when_asked_for_alone_and_are_said(
    arrays: dict[str, list[Any]], pocket: Tokenizer
) -> None:
    more = [("<|im_start|>", -1000.0, CONTROL), ("<|im_end|>", -1000.0, CONTROL)]
    found = header(changed(arrays, more=more))
    rebuilt = build_tokenizer(found)
    assert len(rebuilt) == 4098
    assert_same(rebuilt, pocket, texts(9, 50))
    turn = "<|im_start|>user\nHi<|im_end|>"
    assert rebuilt.encode(turn) == pocket.encode(turn) and rebuilt.decode(rebuilt.encode(turn)) == turn
    assert rebuilt.encode(turn, special=True) == [2, 4096, *pocket.encode("user\nHi", bos=False), 4097]
    assert rebuilt.decode([4096, *rebuilt.encode("a", bos=False)]) == "a"
    said = "control pieces that Gemma 2 does not have ('<|im_start|>', '<|im_end|>'): "
    assert notes(found)[-2:] == [said + "a text is read as one with special=True", "a text also ends at '<|im_end|>'"]
    assert end_ids(found) == {1, 4097}


IM = [("<|im_start|>", -1000.0, CONTROL), ("<|im_end|>", -1000.0, CONTROL)]


def test_an_added_end_of_type_normal_is_a_control_piece_as_llama_cpp_takes_it(pocket: Tokenizer) -> None:
    for name in ("<|im_end|>", "<|odd|>"):
        found = header(changed(plain_arrays(), more=[(name, 0.0, NORMAL)]), eos_token_id=Value("u32", 4096))
        rebuilt = build_tokenizer(found)
        assert rebuilt.encode(f"a{name}", special=True) == [2, *pocket.encode("a", bos=False), 4096]
        assert rebuilt.encode(f"a{name}") == pocket.encode(f"a{name}") and 4096 in end_ids(found)
        assert f"{name!r} is of type NORMAL, and taken for a control piece" in notes(found)
    word = header(plain_arrays(), eos_token_id=Value("u32", 603))  # a piece that merges make ends no text
    with pytest.raises(BadModelFile, match="eos_token_id is 603"):
        build_tokenizer(word)


DAMAGED = ("{", "3", "[3]", '[["the", 9999, true, false, false, false]]', '[["<bos>", 603, true, false, false, false]]')


@pytest.mark.parametrize("stated", [*DAMAGED, '[["a", 1]]', "[" * 5000])
def test_added_tokens_that_are_damaged_are_refused(stated: str) -> None:
    good = header(plain_arrays())
    found = replace(good, metadata={**good.metadata, "gemma2.added_tokens": Value("str", stated)})
    with pytest.raises(BadModelFile, match=r"gemma2.added_tokens is .* which is damaged"):
        build_tokenizer(found)


def renamed(arrays: dict[str, list[Any]], names: dict[int, str]) -> dict[str, list[Any]]:
    copy = changed(arrays, dict.fromkeys(names, CONTROL))
    for i, name in names.items():
        copy["tokens"][i] = name
    return copy


@pytest.mark.parametrize("key", ["eos_token_id", "eot_token_id", "eom_token_id"])
@pytest.mark.parametrize("style", STYLES)
def test_a_chatml_fine_tune_loads_and_ends_at_its_own_token(style: str, key: str, pocket: Tokenizer) -> None:
    found = header(changed(STYLES[style](), more=IM), **{key: Value("u32", 4097)})
    assert 4097 in end_ids(found) and "a text also ends at '<|im_end|>'" in notes(found)
    assert build_tokenizer(found).special == pocket.special


@pytest.mark.parametrize("style", STYLES)
def test_pieces_that_a_fine_tune_renamed_in_place_are_its_own_tokens(style: str, pocket: Tokenizer) -> None:
    found = header(renamed(STYLES[style](), {1: "<|im_end|>", 7: "<|im_start|>"}), eos_token_id=Value("u32", 1))
    rebuilt = build_tokenizer(found)
    assert rebuilt.special["eos"] == 1 and end_ids(found) == {1} and rebuilt.notes == ("<eos> is spelled '<|im_end|>'",)
    assert rebuilt.encode("<|im_start|>a<|im_end|>", special=True) == [2, 7, *pocket.encode("a", bos=False), 1]
    assert rebuilt.encode("<|im_start|>a") == pocket.encode("<|im_start|>a")
    again = tokenizer_metadata(rebuilt.to_proto())
    assert again["tokenizer.ggml.tokens"].value[1] == "<|im_end|>"
    assert again["tokenizer.ggml.eos_token_id"] == Value("u32", 1)


def test_an_unstated_end_is_one_at_which_llama_cpp_always_ends() -> None:
    assert end_ids(header(changed(plain_arrays(), more=IM))) == {1, 4097}
    assert end_ids(header(plain_arrays())) == {1}


def test_pieces_that_fill_an_embedding_are_rows_without_a_piece(pocket: Tokenizer) -> None:
    fill = [(f"[PAD{i}]", -10000.0, UNUSED) for i in range(4096, 4160)]
    rebuilt = build_tokenizer(header(changed(plain_arrays(), more=fill)))
    assert (len(rebuilt), rebuilt.rows, rebuilt.decode([4159])) == (4096, 4160, "")
    made = tokenizer_metadata(pocket.to_proto(), rows=4160)
    assert made["tokenizer.ggml.tokens"].value[4096:] == [token for token, _, _ in fill]
    assert set(made["tokenizer.ggml.scores"].value[4096:].tolist()) == {-10000.0}
    assert set(made["tokenizer.ggml.token_type"].value[4096:].tolist()) == {UNUSED}
    with pytest.raises(BadModelFile, match="4096 pieces for an embedding of 4000 rows, which a GGUF cannot state"):
        tokenizer_metadata(pocket.to_proto(), rows=4000)


def test_user_defined_pieces_that_a_fine_tune_added_are_found_in_text(
    arrays: dict[str, list[Any]], pocket: Tokenizer
) -> None:
    more = [("<tool call>", -1000.0, USER_DEFINED), ("[PAD4097]", -10000.0, UNUSED)]
    rebuilt = build_tokenizer(header(changed(arrays, more=more)))
    plain = pocket.encode("x", bos=False)
    assert rebuilt.encode("x<tool call>x", bos=False) == [*plain, 4096, *plain]
    assert rebuilt.decode([4096]) == "<tool call>"
    assert_same(rebuilt, pocket, [*texts(10, 50), "[PAD4097]"])


@pytest.mark.parametrize("style", STYLES)
def test_a_symbol_that_a_fine_tune_renamed_is_still_one(style: str) -> None:
    arrays = STYLES[style]()
    arrays["tokens"][7] = "<tool>"
    arrays["token_type"][7] = NORMAL if style == "plain" else USER_DEFINED
    assert build_tokenizer(header(arrays)).encode("a<tool>", bos=False)[-1] == 7


# What a file leaves out.


def test_a_file_that_states_everything_needs_no_notes() -> None:
    assert notes(header(plain_arrays(), eot_token_id=Value("u32", 107))) == []


def test_the_end_of_turn_is_found_by_its_piece_and_said(arrays: dict[str, list[Any]]) -> None:
    found = header(arrays)
    assert build_tokenizer(found).special["end_of_turn"] == 107
    assert notes(found) == ["no end-of-turn id is stated: it is that of the piece <end_of_turn>, as llama.cpp finds it"]
    without = plain_arrays()
    without["tokens"][107] = "<end>"
    assert notes(header(without)) == [] and "end_of_turn" not in build_tokenizer(header(without)).special


@pytest.mark.parametrize("stated", [None, Value("bool", False)])
def test_a_bos_is_put_in_front_whatever_the_file_says_and_that_is_said(stated: Value | None) -> None:
    found = header(plain_arrays(), add_bos_token=stated, eot_token_id=Value("u32", 107))
    assert build_tokenizer(found).encode("a")[0] == 2
    assert notes(found) == [
        "add_bos_token is not stated: <bos> is put in front, as by llama.cpp"
        if stated is None
        else "add_bos_token is false, but Gemma 2 needs <bos>: it is put in front all the same"
    ]


def test_an_eos_behind_the_prompt_is_not_put_there_and_that_is_said(pocket: Tokenizer) -> None:
    found = header(plain_arrays(), add_eos_token=Value("bool", True), eot_token_id=Value("u32", 107))
    assert build_tokenizer(found).encode("a") == pocket.encode("a")
    assert notes(found) == ["add_eos_token is true, but Gemma 2 was trained without: no <eos> is put behind a prompt"]


@pytest.mark.parametrize("stated", [None, Value("bool", True)])
def test_a_space_comes_before_every_text_unless_the_file_says_no_and_that_is_said(
    stated: Value | None, pocket: Tokenizer
) -> None:
    found = header(plain_arrays(), add_space_prefix=stated, eot_token_id=Value("u32", 107))
    rebuilt = build_tokenizer(found)
    for text in ("And God said", " two", "\n", "a<start_of_turn>b<end_of_turn>"):
        for special in (False, True):
            assert rebuilt.encode(text, special=special) == pocket.encode(" " + text, special=special)
            assert rebuilt.decode(rebuilt.encode(text, special=special)) == " " + text
    assert rebuilt.encode("") == [2]
    reply = pocket.encode("Let there be light", bos=False)
    assert "".join(rebuilt.decode([token]) for token in reply) == "Let there be light"  # as streamed
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        rebuilt.encode("a\ud800")
    (said,) = notes(found)
    assert said.startswith(f"add_space_prefix is {'not stated' if stated is None else 'true'}: a space is put before")
    assert "though Gemma 2 was trained without" in said
    # Chat goes on working: tags and content in the same order.
    assert [t for t in chat_ids([{"role": "user", "content": "Hi"}], rebuilt) if t in (2, 106, 107)] == [
        2,
        106,
        107,
        106,
    ]


def test_the_space_before_a_text_is_kept_in_the_model_file_made_from_it_and_in_the_metadata_of_that() -> None:
    found = header(plain_arrays(), add_space_prefix=None)
    proto = tokenizer_model(found)
    assert build_tokenizer(found).to_proto() == proto
    assert tokenizer_metadata(proto)["tokenizer.ggml.add_space_prefix"].value is True
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert bare.encode("And") == Tokenizer(POCKET_PROTO).encode(" And", bos=False)


def test_unstated_bos_and_eos_are_the_pieces_of_that_spelling_and_not_llamas_numbers() -> None:
    found = header(plain_arrays(), bos_token_id=None, eos_token_id=None, eot_token_id=Value("u32", 107))
    assert (build_tokenizer(found).special["bos"], build_tokenizer(found).special["eos"]) == (2, 1)
    assert notes(found) == ["no bos or eos id is stated: <bos> and <eos> as spelled, where llama.cpp takes Llama's"]


def test_a_file_is_tuned_for_chat_if_it_has_gemmas_template_or_ends_with_a_turn() -> None:
    turn = header(plain_arrays(), eos_token_id=Value("u32", 107))
    assert chat_tuned(header(plain_arrays())) is None and chat_tuned(turn) is True
    assert dict(build_tokenizer(turn).special) == dict(build_tokenizer(header(plain_arrays())).special)
    for template, tuned in ((GEMMA, True), ("{{ messages }}", None)):
        metadata = {**header(plain_arrays()).metadata, "tokenizer.chat_template": Value("str", template)}
        assert chat_tuned(GGUF(Path("model.gguf"), 3, 32, metadata, {}, 0)) is tuned


@pytest.mark.parametrize(
    "eos", [None, Value("u32", 4096), Value("str", "</s>"), Value("i32", -1), Value("f32[]", np.zeros(2))]
)
def test_a_damaged_eos_says_nothing_about_chat(eos: Value | None) -> None:
    assert chat_tuned(header(plain_arrays(), eos_token_id=eos)) is None


# What is refused.


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": None}, "no tokenizer in it (tokenizer.ggml.model is missing)"),
        ({"model": Value("str", "gpt2")}, "tokenizer.ggml.model is 'gpt2' (str), and Gemma 2's is 'llama'"),
        (
            {"model": Value("f32[]", np.ones(999))},
            "tokenizer.ggml.model is an array of 999 (f32[]), and Gemma 2's is 'llama'",
        ),
        (
            {"bos_token_id": Value("u32[]", np.ones(999))},
            "bos_token_id is an array of 999 (u32[]), and must be a u32 below 4096",
        ),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
        ({"scores": Value("f64[]", np.zeros(4096))}, "tokenizer.ggml.scores is of type f64[], and must be f32[]"),
        ({"token_type": Value("i32[]", np.ones(7, np.int32))}, "tokens has 4096 entries, scores 4096 and token_type 7"),
        ({"bos_token_id": Value("u32", 1)}, "tokenizer.ggml.bos_token_id is 1, which is '<eos>' and not <bos>"),
        ({"eos_token_id": Value("u32", 213)}, "tokenizer.ggml.eos_token_id is 213, which is '</s>' and not <eos>"),
        (
            {"eot_token_id": Value("u32", 4096)},
            "tokenizer.ggml.eot_token_id is 4096 (u32), and must be a u32 below 4096",
        ),
        (
            {"unknown_token_id": Value("str", "<unk>")},
            "unknown_token_id is '<unk>' (str), and must be a u32 below 4096",
        ),
        ({"add_space_prefix": Value("u8", 0)}, "tokenizer.ggml.add_space_prefix is of type u8, and must be bool"),
    ],
)
def test_metadata_that_are_no_gemma_tokenizer_are_refused_by_name_with_the_cure(
    changes: dict[str, Value | None], why: str
) -> None:
    with pytest.raises(BadModelFile) as refused:
        build_tokenizer(header(plain_arrays(), **changes))
    message = str(refused.value)
    assert message.startswith("model.gguf: ") and why in message and "\n" not in message
    assert message.endswith("name a tokenizer.model with tokenizer=")


@pytest.mark.parametrize(
    ("name", "place", "value", "why"),
    [
        ("token_type", 500, 7, "tokenizer.ggml.token_type 7 of token 500; there are types 1 to 6"),
        ("scores", 139, -139.0, "token 139 ('▁▁') stands before the byte tokens, where Gemma keeps what no merge"),
        ("scores", slice(None), [-1000.0] * 4096, "all merged tokens have the score -1000, so the order of merges"),
        ("scores", 700, float("nan"), "tokenizer.ggml.scores has nan for token 700, which is not a finite number"),
        ("scores", 0, float("-inf"), "tokenizer.ggml.scores has -inf for token 0, which is not a finite number"),
        ("tokens", slice(600, 602), ["the", "the"], "the is already defined"),
        ("tokens", 700, "", "piece must not be empty"),
        ("tokens", 227, "x0A", "byte piece x0A is invalid"),
        ("tokens", 2, "<start>", "<bos> is piece none, but the model declares piece none as bos"),
    ],
)
def test_arrays_that_are_no_gemma_vocabulary_are_refused_with_the_cure(
    name: str, place: Any, value: Any, why: str
) -> None:
    arrays = plain_arrays()
    arrays[name][place] = value
    with pytest.raises(BadModelFile) as refused:
        build_tokenizer(header(arrays, bos_token_id=None))
    message = str(refused.value)
    assert message.startswith("model.gguf: ") and why in message and "\n" not in message
    assert message.endswith("name a tokenizer.model with tokenizer=")


def test_no_damage_to_the_arrays_does_worse_than_a_refusal() -> None:
    source = random.Random(11)
    for _ in range(60):
        arrays = STYLES[source.choice(list(STYLES))]()
        for _ in range(source.choice((1, 3, 400))):
            i = source.randrange(len(arrays["tokens"]))
            name = source.choice(list(arrays))
            arrays[name][i] = {
                "tokens": source.choice(("", "\x00", "▁", "a" * 3000, arrays["tokens"][i - 1], "\uffff")),
                "scores": source.choice((0.0, -1000.0, 1e38, float("inf"), -1.5)),
                "token_type": source.randrange(-1, 8),
            }[name]
        try:
            found = build_tokenizer(header(arrays))
        except BadModelFile as error:
            assert "\n" not in str(error)
        else:
            assert found.encode("In the beginning")[0] == 2


# The way back.


def test_a_file_written_by_ggufs_own_writer_reads_as_it_was_meant(
    arrays: dict[str, list[Any]], tmp_path: Path, pocket: Tokenizer
) -> None:
    writer = gguf_py.GGUFWriter(tmp_path / "vocab.gguf", "gemma2")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(arrays["tokens"])
    writer.add_token_scores(arrays["scores"])
    writer.add_token_types(arrays["token_type"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_same(build_tokenizer(read_header(tmp_path / "vocab.gguf")), pocket, texts(12, 100))


def test_the_metadata_of_a_model_file_are_what_the_converter_writes_beside_a_tokenizer_config() -> None:
    made, expected = tokenizer_metadata(POCKET_PROTO), configured_arrays()
    for name, values in expected.items():
        assert list(made[f"tokenizer.ggml.{name}"].value) == values, name
    rest = {key.removeprefix("tokenizer.ggml."): value for key, value in list(made.items())[5:]}
    assert rest == {
        "bos_token_id": Value("u32", 2),
        "eos_token_id": Value("u32", 1),
        "unknown_token_id": Value("u32", 3),
        "padding_token_id": Value("u32", 0),
        "add_bos_token": Value("bool", True),
        "add_sep_token": Value("bool", False),
        "add_eos_token": Value("bool", False),
        "add_space_prefix": Value("bool", False),
    }


def test_the_one_steering_piece_that_the_converter_takes_for_text_is_user_defined() -> None:
    more = [("[toxicity=0]", 0.0, NORMAL), ("<unused99>", 0.0, NORMAL)]
    made = tokenizer_metadata(tokenizer_model(header(changed(plain_arrays(), more=more))))
    assert made["tokenizer.ggml.token_type"].value[-2:].tolist() == [USER_DEFINED, CONTROL]


def test_pieces_scores_and_kinds_survive_the_way_into_a_gguf_and_back(pocket: Tokenizer) -> None:
    found = GGUF(Path("model.gguf"), 3, 32, tokenizer_metadata(POCKET_PROTO), {}, 0)
    back, given = read_proto(tokenizer_model(found), "back"), read_proto(POCKET_PROTO, "given")
    assert back.pieces == given.pieces and np.array_equal(back.scores, given.scores)
    assert np.array_equal(back.kinds, given.kinds) and back.space_prefix is given.space_prefix is False
    assert_same(Tokenizer(tokenizer_model(found)), pocket, texts(13, 100))


@pytest.mark.parametrize(
    ("appended", "why"),
    [
        (b"\x12\x02\x18\x01", "model_type is 1, and in Gemma's tokenizers 2"),
        (b"\x1a\x02\x20\x01", "remove_extra_whitespaces is 1, and in Gemma's tokenizers 0"),
        (b"\x1a\x02\x28\x00", "escape_whitespaces is 0, and in Gemma's tokenizers 1"),
    ],
)
def test_a_model_file_with_settings_that_a_gguf_cannot_hold_is_refused(appended: bytes, why: str) -> None:
    with pytest.raises(BadModelFile, match=f"^words.model: {why}$"):
        tokenizer_metadata(POCKET_PROTO + appended, "words.model")  # the later of two settings counts


def test_a_piece_of_a_kind_that_sentencepiece_does_not_have_is_refused() -> None:
    with pytest.raises(
        BadModelFile, match=r"^words.model: damaged at or after piece 4097 \(type 9, .*download it again$"
    ):
        tokenizer_metadata(POCKET_PROTO + b"\x0a\x05\x0a\x01\x01\x18\x09", "words.model")


def test_no_damage_to_a_model_file_does_worse_than_a_refusal(pocket: Tokenizer) -> None:
    source = random.Random(14)
    for trial in range(60):
        damaged = bytearray(POCKET_PROTO)
        if trial % 2:
            del damaged[source.randrange(len(damaged)) :]
        else:
            damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
        for read in (tokenizer_metadata, read_proto):
            try:
                read(bytes(damaged), "words.model")
            except BadModelFile as error:
                assert str(error).startswith("words.model: ") and "\n" not in str(error)
