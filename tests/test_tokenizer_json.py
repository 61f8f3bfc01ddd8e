"""A tokenizer.json gives every text the ids that the library `tokenizers` gives it, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gemma2 import BadModelFile, Tokenizer
from gemma2.checkpoints import merges
from gemma2.checkpoints.tokenizer_json import read_tokenizer_json
from gemma2.load import POCKET
from tests.conftest import SHARED
from tests.tokenizer_files import chatml, fast, older, pocket, texts, token, write

REAL = SHARED / "data" / "gemma2-tokenizer"
needs_real = pytest.mark.needs("shared", "data/gemma2-tokenizer")
Content = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore:the text begins with <bos>")


def differing(found: Tokenizer, path: Path, some: list[str]) -> list[str]:
    """The texts that have other ids in the library."""
    peer = tokenizers.Tokenizer.from_file(str(path))
    return [
        text
        for text in some
        if found.encode(text, bos=False, special=True) != peer.encode(text, add_special_tokens=False).ids
    ]


@pytest.mark.parametrize("change", [lambda c: c, older, chatml, lambda c: chatml(older(c))])
def test_the_ids_are_those_of_the_library(change: Callable[[Content], Content], tmp_path: Path) -> None:
    path = write(tmp_path, change(pocket()))
    found = read_tokenizer_json(path)
    assert found.notes == () and differing(found, path, texts(1, 1000)) == []
    assert found.encode("In the beginning") == Tokenizer.from_file(POCKET / "tokenizer.model").encode(
        "In the beginning"
    )


def test_runs_of_more_than_31_spaces_and_a_typed_space_sign_are_cut_as_by_the_library(tmp_path: Path) -> None:
    path = write(tmp_path, pocket())
    found, model = read_tokenizer_json(path), Tokenizer.from_file(POCKET / "tokenizer.model")
    some = [" " * n + "the" for n in range(100)] + ["▁" * n for n in range(70)] + ["▁▁ ", " ▁▁", "  ▁▁ ▁ ▁▁▁"]
    assert differing(found, path, some) == []
    assert found.encode(" " * 33) != model.encode(" " * 33)  # SentencePiece takes the longest symbol first,
    path = write(tmp_path, older(pocket()))
    found = read_tokenizer_json(path)
    assert differing(found, path, some) == []
    assert found.encode(" " * 33) == model.encode(" " * 33)  # and so do Google's files
    assert found.encode("▁▁  ") != model.encode("▁▁  ")
    for text in some:
        assert found.decode(found.encode(text)) == text.replace("▁", " ")


def test_what_transformers_writes_is_what_these_tests_read(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "gemma2"}, "config.json")
    write(tmp_path, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}, "tokenizer_config.json")
    (tmp_path / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    code = (
        "import sys, transformers\n"
        "transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1] + '/saved')"
    )
    pytest.importorskip("transformers")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    written = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.dumps(written) == json.dumps(pocket())


@needs_real
@pytest.mark.long
def test_gemma_2s_own_vocabulary_gives_the_golden_ids_and_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = (REAL / "tokenizer.model").read_bytes()
    path = write(tmp_path, older(fast(proto, merges=False)))
    check, checked = merges._check_complete, list[None]()

    def watched(*given: Any) -> None:
        checked.append(check(*given))

    monkeypatch.setattr(merges, "_check_complete", watched)
    found = read_tokenizer_json(path)
    assert checked == []  # the merges are known to be all that its pieces allow, as is found when they are looked at
    monkeypatch.setattr(merges, "KNOWN", {})
    assert read_tokenizer_json(path).to_proto() == proto and checked == [None]
    rows = [json.loads(line) for line in (REAL / "golden.jsonl").read_text(encoding="utf-8").splitlines()]
    assert differing(found, path, [row["text"] for row in rows] + texts(2, 200)) == []
    for row in rows:
        if row["agrees_with_hf_tokenizers"]:
            assert found.encode(row["text"], bos=False, special=True) == row["ids"]
    assert found.to_proto() == proto


# Added tokens.


def test_user_text_becomes_no_control_token_of_the_file_but_finds_its_other_tokens(tmp_path: Path) -> None:
    found = read_tokenizer_json(write(tmp_path, chatml(pocket())))
    turn = "<|im_start|>user\n<tool call><|im_end|>"
    plain = found.encode(turn)
    assert 4098 in plain and not {4096, 4097} & set(plain) and found.decode(plain) == turn
    assert found.encode(turn, special=True) == [2, 4096, *found.encode("user\n", bos=False), 4098, 4097]
    assert found.decode([4096, 4098, 4097, 4099]) == "<tool call>wherefore art"


def test_a_piece_is_renamed_in_the_vocabulary_or_by_an_added_token_of_its_id(tmp_path: Path) -> None:
    content = pocket()
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {"<|im_end|>" if piece == "<eos>" else piece: i for piece, i in vocabulary.items()}
    content["added_tokens"][1] = token(1, "<|im_end|>")
    content["added_tokens"][14] = token(14, "<|im_start|>")
    found = read_tokenizer_json(write(tmp_path, content))
    assert found.notes == ("piece 14, '<unused7>', is renamed to '<|im_start|>'", "<eos> is spelled '<|im_end|>'")
    assert found.special["eos"] == 1 and found.encode("<|im_start|><|im_end|>", special=True) == [2, 14, 1]
    assert Tokenizer(found.to_proto()).special == found.special


def test_ids_with_holes_are_those_that_the_library_gives_and_that_is_said(tmp_path: Path) -> None:
    content = pocket()
    content["added_tokens"] += [token(4100, "<|im_start|>"), token(4105, "<|im_end|>")]
    path = write(tmp_path, content)
    found = read_tokenizer_json(path)
    assert differing(found, path, ["a<|im_start|>b<|im_end|>"]) == []
    assert found.notes[0] == "added token '<|im_start|>' has the id 4096, as in transformers, and not 4100"


def test_what_a_training_program_left_in_the_file_changes_nothing_and_is_said(tmp_path: Path) -> None:
    content = pocket()
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["post_processor"] = None
    found = read_tokenizer_json(write(tmp_path, content))
    assert len(found.encode("In the beginning God created the heaven and the earth")) > 8
    assert [note.split(",")[0] for note in found.notes] == [
        "tokenizer.json puts no <bos> before a text",
        "tokenizer.json states truncation",
    ]


# What is refused.


def at(*keys: Any, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def of_two(content: Content) -> int:
    """Where the first of two merges stands that make the same piece of letters."""
    merges = content["model"]["merges"]
    return next(i for i in range(1000, len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))


REFUSED: dict[str, tuple[Callable[[Content], None], str]] = {
    "another model": (at("model", "type", value="Unigram"), "model.type is 'Unigram'"),
    "no byte fallback": (at("model", "byte_fallback", value=False), "model.byte_fallback is False"),
    "dropout": (at("model", "dropout", value=0.1), "model.dropout is 0.1"),
    "whole words first": (at("model", "ignore_merges", value=True), "model.ignore_merges is True"),
    "no normalizer": (at("normalizer", value=None), "normalizer null is not Gemma's"),
    "another normalizer": (at("normalizer", value={"type": "NFKC"}), "normalizer NFKC ({}) is not Gemma's"),
    "a space prefix": (
        at("normalizer", value={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {}]}),
        "normalizer Sequence (Prepend, None) is not Gemma's",
    ),
    "Llama 3's": (at("pre_tokenizer", value={"type": "ByteLevel"}), "pre_tokenizer ByteLevel ({}) is not Gemma's"),
    "no decoder": (at("decoder", value=None), "decoder null is not Gemma's"),
    "another decoder": (at("decoder", value={"type": "ByteLevel"}), "decoder ByteLevel ({}) is not Gemma's"),
    "another end": (at("post_processor", value={"type": "ByteLevel"}), "post_processor ByteLevel ({}) is not Gemma's"),
    "a symbol as a single word": (
        at("added_tokens", 9, "single_word", value=True),
        "added token '<unused2>' has single_word=true, and one of Gemma's symbols is in it",
    ),
    "a merge missing": (
        lambda content: content["model"]["merges"].pop(),
        "merges, but 5,929 pairs of pieces make a piece",
    ),
    "merges of a piece apart": (
        lambda content: content["model"]["merges"].append(content["model"]["merges"].pop(of_two(content))),
        "the merges of one piece do not stand together",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_is_not_gemmas_is_refused_by_the_name_of_what_differs(case: str, tmp_path: Path) -> None:
    change, why = REFUSED[case]
    content = pocket()
    change(content)
    path = write(tmp_path, content)
    with pytest.raises(BadModelFile) as refused:
        read_tokenizer_json(path)
    assert str(refused.value).startswith(f"{path}: ") and why in str(refused.value) and "\n" not in str(refused.value)


def test_a_sequence_of_gemmas_normalizer_alone_is_taken(tmp_path: Path) -> None:
    content = pocket()
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]]}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
    assert read_tokenizer_json(write(tmp_path, content)).notes == ()


def test_pieces_in_another_order_than_their_merges_are_taken_if_each_pieces_merges_stand_together(
    tmp_path: Path,
) -> None:
    content = pocket()
    merges = content["model"]["merges"]
    made = {a + b for a, b in merges[-400:]}
    last = [merge for merge in merges if "".join(merge) in made]
    content["model"]["merges"] = [merge for merge in merges if "".join(merge) not in made] + sorted(
        last, key=lambda merge: merge[0] + merge[1]
    )
    for run in range(2, 32):  # symbols, which are not merged where they are found as they are typed
        content["added_tokens"][137 + run]["normalized"] = True
    path = write(tmp_path, content)
    assert differing(read_tokenizer_json(path), path, texts(3, 500)) == []
