"""Which tokenizer a folder has, and what it is for an embedding of more or fewer rows than pieces."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

import gemma2
from gemma2 import BadModelFile, Tokenizer
from gemma2.checkpoints.gguf import read_header
from gemma2.checkpoints.sentencepiece_proto import CONTROL, Vocabulary, read_proto, write_proto
from gemma2.checkpoints.vocabulary import parse_tokenizer, tokenizer_of
from gemma2.convert import convert
from gemma2.load import POCKET
from tests.conftest import raw_config, tensors_of, tiny
from tests.tokenizer_files import chatml, older, pocket, texts, token, write

MODEL = POCKET / "tokenizer.model"
PROTO = MODEL.read_bytes()
Folder = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:the text begins with <bos>")


def model_in(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(PROTO)
    return folder


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer(PROTO)


# Which file.


def test_tokenizer_json_alone_is_enough(folder: Folder, plain: Tokenizer) -> None:
    place = folder()
    before = gemma2.load(place).generate("In the beginning", 4)
    (place / "tokenizer.model").unlink()
    write(place, older(pocket()))
    gemma = gemma2.load(place)
    assert gemma.generate("In the beginning", 4) == before and gemma.notes == ()


def test_of_two_files_that_say_the_same_the_model_file_holds_and_nothing_is_said(tmp_path: Path) -> None:
    write(model_in(tmp_path), pocket())
    found = tokenizer_of(tmp_path)
    assert found.to_proto() == PROTO and found.added is None and found.notes == ()


def test_of_two_files_that_differ_tokenizer_json_holds_as_in_transformers_and_that_is_said(tmp_path: Path) -> None:
    write(model_in(tmp_path), chatml(pocket()))
    found = tokenizer_of(tmp_path)
    assert len(found) == 4100
    assert found.notes == (
        "tokenizer.json (4100 pieces) is used, as in transformers; tokenizer.model (4096) is another",
    )


def test_a_tokenizer_json_that_is_not_gemmas_gives_way_to_a_tokenizer_model_and_that_is_said(tmp_path: Path) -> None:
    content = pocket()
    content["normalizer"] = {"type": "NFKC"}
    write(model_in(tmp_path), content)
    found = tokenizer_of(tmp_path)
    assert found.to_proto() == PROTO
    assert found.notes[0].startswith("tokenizer.json cannot be used, so tokenizer.model is: normalizer NFKC")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(BadModelFile, match=r"tokenizer.json: normalizer NFKC .*; any Gemma 2 repository, as google/"):
        tokenizer_of(tmp_path)


def test_tokenizer_takes_a_file_of_any_kind_or_a_folder(tmp_path: Path, plain: Tokenizer) -> None:
    quantized = convert("pocket", tmp_path / "pocket.gguf", progress=False).path
    for given in (MODEL, str(MODEL), write(tmp_path, pocket()), POCKET, quantized, plain):
        found = parse_tokenizer(given)
        assert found is not None and found.encode("In the beginning") == plain.encode("In the beginning"), given
    assert parse_tokenizer(None) is None
    with pytest.raises(BadModelFile, match="google/gemma-2-2b: no such file or folder"):
        parse_tokenizer("google/gemma-2-2b")


# What files add.


def decoder(*tokens: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4 wrote it."""
    return {"added_tokens_decoder": {str(added.pop("id")): added for added in copy.deepcopy(list(tokens))}}


ADDED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "tokenizer_config.json": (
        {"tokenizer_config.json": decoder(token(4096, "<|im_start|>"), token(4097, "<|im_end|>"))},
        [4096, 4097],
    ),
    "added_tokens.json": (
        {
            "added_tokens.json": {"<|im_end|>": 4097, "<|im_start|>": 4096},
            "special_tokens_map.json": {
                "additional_special_tokens": ["<|im_start|>"],
                "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False},
            },
        },
        [4096, 4097],
    ),
    "names alone": (
        {"tokenizer_config.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}},
        [4097, 4096],
    ),
    "renamed pieces": (
        {"tokenizer_config.json": decoder(token(7, "<|im_start|>"), token(1, "<|im_end|>"))},
        [7, 1],
    ),
}


@pytest.mark.parametrize("case", ADDED)
def test_tokens_that_are_added_beside_a_model_file_are_found_when_asked_for(
    case: str, tmp_path: Path, plain: Tokenizer
) -> None:
    files, (start, end) = ADDED[case]
    for name, content in files.items():
        write(model_in(tmp_path), content, name)
    found = tokenizer_of(tmp_path)
    turn = "<|im_start|>user\nHi<|im_end|>"
    assert found.encode(turn, special=True) == [2, start, *plain.encode("user\nHi", bos=False), end]
    assert found.encode(turn) == plain.encode(turn) and found.decode([start, end]) == ""
    again = Tokenizer(found.to_proto())
    assert again.encode(turn, special=True) == found.encode(turn, special=True)


def test_google_s_own_list_of_added_tokens_changes_nothing(tmp_path: Path) -> None:
    known = [added for added in pocket()["added_tokens"] if added["content"] != "<unk>"]
    write(model_in(tmp_path), decoder(*known), "tokenizer_config.json")
    found = tokenizer_of(tmp_path)
    assert found.to_proto() == PROTO and found.notes == ()


def test_a_model_file_whose_eos_is_respelled_as_a_control_piece_loads(plain: Tokenizer) -> None:
    vocabulary = read_proto(PROTO, "pocket")
    pieces = ["<|im_end|>" if piece == "<eos>" else piece for piece in vocabulary.pieces]
    assert vocabulary.kinds[1] == CONTROL
    good = write_proto(Vocabulary(pieces, vocabulary.scores, vocabulary.kinds))
    respelled = PROTO.replace(b"\x05<eos>\x15", b"\x05<odd>\x15")  # the piece alone, as Unsloth does it
    for proto, name in ((good, "<|im_end|>"), (respelled, "<odd>")):
        found = Tokenizer(proto)
        assert found.special["eos"] == 1 and found.notes == (f"<eos> is spelled {name!r}",)
        assert found.encode(f"a{name}", special=True)[-1] == 1 and 1 not in found.encode(f"a{name}")


# Rows.


def test_an_embedding_may_have_some_more_rows_than_pieces_and_those_have_no_text(folder: Folder) -> None:
    place = folder("padded", tensors=tensors_of(tiny(vocab_size=4160)))
    write(place, raw_config(vocab_size=4160), "config.json")
    gemma = gemma2.load(place)
    assert gemma.notes == (
        "the embedding has 4160 rows and the tokenizer 4096 pieces: the last 64 have no piece, and no text",
    )
    ids = gemma.tokenizer.encode("Let there be light")
    assert gemma.tokenizer.decode([*ids, 4096, 4159]) == "Let there be light"
    assert gemma.tokenizer.pending_bytes([4159]) == 0
    for wrong in (4160, -1):
        with pytest.raises(ValueError, match=r"is not an integer in \[0, 4160\)"):
            gemma.tokenizer.decode([wrong])


def test_an_embedding_may_have_some_fewer_rows_and_a_text_that_needs_one_is_refused(plain: Tokenizer) -> None:
    cut = plain.for_rows(4000)
    assert cut.encode("In the beginning") == plain.encode("In the beginning") and len(cut) == 4096
    text = plain.decode([4050])
    with pytest.raises(ValueError, match=r"the text needs piece 4050 \('.'\), and the embedding has only 4000 rows"):
        cut.encode(text)
    with pytest.raises(ValueError, match=r"in \[0, 4000\)"):
        cut.decode([4050])
    assert plain.encode(text)[-1] == 4050  # the one it was made from is as before


@pytest.mark.parametrize("rows", [0, 3, 400, 3072, 5120, 256000])
def test_a_tokenizer_of_another_size_altogether_is_refused(rows: int, plain: Tokenizer) -> None:
    with pytest.raises(BadModelFile, match=f"4096 pieces, but the embedding has {rows} rows"):
        plain.for_rows(rows)


# What begins with <bos>.


def test_a_text_that_begins_with_bos_gets_one_when_control_tokens_are_asked_for(plain: Tokenizer) -> None:
    prompt = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    ids = plain.encode(prompt, special=True)
    assert ids == plain.encode(prompt.removeprefix("<bos>"), special=True) and ids.count(2) == 1
    assert plain.encode(prompt, special=True, bos=False) == ids
    assert plain.encode("a<eos><pad>", special=True)[-2:] == [1, 0]
    with pytest.warns(UserWarning, match="special=True"):
        plain.encode(prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.encode("a <bos>")


# Copies.


def same_ids(found: Tokenizer, other: Tokenizer) -> None:
    for text in texts(4, 100):
        for special in (True, False):
            assert found.encode(text, special=special) == other.encode(text, special=special)


@pytest.mark.parametrize("change", [None, chatml])
def test_a_tokenizer_can_be_pickled_and_copied(change: Callable[[Any], Any] | None, tmp_path: Path) -> None:
    write(tmp_path, change(pocket()) if change else pocket())
    found = tokenizer_of(tmp_path).for_rows(4110)
    for other in (pickle.loads(pickle.dumps(found)), copy.copy(found), copy.deepcopy(found)):
        same_ids(other, found)
        assert (other.rows, other.notes, other.special, other.where) == (4110, found.notes, found.special, found.where)


def test_a_gemma_can_be_pickled_copied_and_used_in_a_spawned_process(pocket: gemma2.Gemma) -> None:
    other = copy.deepcopy(pocket)
    with torch.no_grad():
        other.model.model.norm.weight.zero_()
    assert not torch.equal(pocket.model.model.norm.weight, other.model.model.norm.weight)
    assert pickle.loads(pickle.dumps(pocket)).generate("In the", 3) == pocket.generate("In the", 3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(pocket.tokenizer.encode, ["In the beginning"]) == [pocket.tokenizer.encode("In the beginning")]


# Out again.


def source_of(folder: Folder, kind: str) -> Path:
    rows = 4096 if kind in ("model", "json") else 4160
    place = folder(f"from-{kind}", tensors=tensors_of(tiny("2b", vocab_size=rows)))
    write(place, raw_config("2b", vocab_size=rows), "config.json")
    if kind != "model":
        write(place, {"json": lambda: older(pocket()), "chatml": lambda: chatml(pocket())}[kind]())
        (place / "tokenizer.model").unlink()
    return place


@pytest.mark.parametrize("kind", ["model", "json", "chatml"])
def test_what_is_written_has_the_same_ids_here_and_in_the_library(kind: str, folder: Folder, tmp_path: Path) -> None:
    place = source_of(folder, kind)
    before = gemma2.load(place).tokenizer
    written = convert(place, tmp_path / "out", progress=False).path
    after = gemma2.load(written).tokenizer
    peer = tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    for text in texts(5, 400):
        ids = before.encode(text, special=True, bos=False)
        assert after.encode(text, special=True, bos=False) == ids == peer.encode(text, add_special_tokens=False).ids
        assert after.encode(text) == before.encode(text)
    assert peer.encode("Hi").ids == before.encode("Hi")
    again = convert(written, tmp_path / "again", progress=False).path
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (written / name).read_bytes(), name


def test_a_gguf_of_a_padded_chatml_model_says_and_means_the_same(folder: Folder, tmp_path: Path) -> None:
    place = source_of(folder, "chatml")
    quantized = convert(place, tmp_path / "out.gguf", progress=False).path
    stated = read_header(quantized).metadata
    assert stated["tokenizer.ggml.tokens"].value[4096:4102] == [
        *("<|im_start|>", "<|im_end|>", "<tool call>", "wherefore art"),
        *("[PAD4100]", "[PAD4101]"),
    ]
    assert stated["tokenizer.ggml.token_type"].value[4096:4102].tolist() == [3, 3, 4, 4, 5, 5]
    opened = gemma2.load(quantized)
    assert len(opened.tokenizer) == 4100 and opened.tokenizer.rows == 4160
    assert 4097 in opened.stop_ids
    turn = "<|im_start|>user\nHi <tool call><|im_end|>"
    assert opened.tokenizer.encode(turn, special=True) == gemma2.load(place).tokenizer.encode(turn, special=True)
    back = convert(quantized, tmp_path / "back", progress=False).path
    assert 4097 in json.loads((back / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert tokenizer_of(back).encode(turn, special=True) == opened.tokenizer.encode(turn, special=True)
