"""tokenizer.json files that must not load: each is refused in one line, at once and in bounded memory."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gemma2.checkpoints.vocabulary import parse_tokenizer
from tests.hostile.child import in_a_child, memory
from tests.tokenizer_files import older, pocket, token

Make = Callable[[], bytes]
SIZE = len(pocket()["model"]["vocab"])


def changed(change: Callable[[dict[str, Any]], object], form: Callable[[Any], Any] = lambda same: same) -> Make:
    def make() -> bytes:
        content = form(pocket())
        change(content)
        return json.dumps(content).encode()

    return make


def at(*keys: Any, value: Any) -> Make:
    """The good file with one value replaced."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return changed(change)


def without(*keys: Any) -> Make:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return changed(change)


def piece(name: Any, id: Any) -> Make:
    return at("model", "vocab", name, value=id)


def added(*tokens: Any) -> Make:
    return changed(lambda content: content["added_tokens"].extend(tokens))


def merges(*more: Any) -> Make:
    return changed(lambda content: content["model"]["merges"].extend(more))


def raw(before: bytes, after: bytes) -> Make:
    """The good file with some of its text replaced."""

    def make() -> bytes:
        good = json.dumps(pocket()).encode()
        assert before in good
        return good.replace(before, after, 1)

    return make


def respell(special: str, id: int, content: Any) -> None:
    content["model"]["vocab"]["odd"] = content["model"]["vocab"].pop(special)
    content["added_tokens"][id]["content"] = "odd"


def cycle(content: Any) -> None:
    """a + b makes ab, and ab + a makes a piece that is part of itself, through merges that name each other's result."""
    content["model"]["merges"][:0] = [["ab", "ab"], ["abab", "ab"], ["ab", "abab"], ["a", "b"]]


DAMAGED = 70  # files
MANY = b"[" + b",".join(b'{"id":%d,"content":"~%d"}' % (SIZE + i, i) for i in range(10**5)) + b"]"
IDS: tuple[Any, ...] = (-1, 1.0, "4096", None, True, [], {}, 2**63, 10**30)
ADDED_IDS: tuple[Any, ...] = (-1, 1.5, "4096", True, [], 2**31, 10**30)
FILES: dict[str, tuple[Make, str]] = {
    "empty": (lambda: b"", "empty file"),
    "white space": (lambda: b" \n" * 30, "empty file"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "HTML": (lambda: b"\n<!DOCTYPE html><html></html>", "a web page (HTML)"),
    "cut short": (lambda: json.dumps(pocket()).encode()[:-1000], "not valid JSON"),
    "not UTF-8": (lambda: b'{"model": "\xff"}', "not valid JSON"),
    "UTF-16": (lambda: json.dumps(pocket()).encode("utf-16-be")[:3001], "not valid JSON"),
    "NaN": (raw(b'"<eos>": 1', b'"<eos>": NaN'), "not valid JSON (NaN is no JSON number)"),
    "Infinity": (raw(b'"<eos>": 1', b'"<eos>": -Infinity'), "not valid JSON (-Infinity is no JSON number)"),
    "a number of 5,000 digits": (raw(b'"<eos>": 1', b'"<eos>": ' + b"1" * 5000), "not valid JSON"),
    "nested lists": (lambda: b'{"model": ' + b"[" * 10**6, "nested too deeply"),
    "nested objects": (lambda: b'{"a":' * 10**6, "nested too deeply"),
    "a list": (lambda: b"[]", "there is no object 'model' in it"),
    "a number": (lambda: b"1", "there is no object 'model' in it"),
    "no model": (without("model"), "there is no object 'model' in it"),
    "model a list": (at("model", value=[]), "there is no object 'model' in it"),
    "Unigram": (at("model", "type", value="Unigram"), "model.type is 'Unigram', and in Gemma's tokenizers 'BPE'"),
    "WordPiece": (at("model", "type", value="WordPiece"), "model.type is 'WordPiece'"),
    "type a list": (at("model", "type", value=["BPE"]), "model.type is ['BPE']"),
    "byte_fallback 1": (at("model", "byte_fallback", value=1), "model.byte_fallback is 1"),
    "byte_fallback left out": (without("model", "byte_fallback"), "model.byte_fallback is False"),
    "a suffix": (at("model", "end_of_word_suffix", value="</w>"), "model.end_of_word_suffix is '</w>'"),
    "no vocabulary": (without("model", "vocab"), "model.vocab must be an object"),
    "vocabulary empty": (at("model", "vocab", value={}), "model.vocab must be an object"),
    "vocabulary of Unigram": (at("model", "vocab", value=[["<pad>", 0.0]]), "model.vocab must be an object"),
    **{f"an id {id!r}": (piece("odd", id), f"piece 'odd' has the id {id!r}") for id in IDS},
    "an id twice": (piece("odd", 7), "pieces '<unused0>' and 'odd' both have the id 7"),
    "a hole": (piece("odd", SIZE + 1), f"has the id {SIZE + 1}, but there are only {SIZE + 1} pieces"),
    "a lone surrogate": (piece("\ud800", SIZE), "not valid Unicode"),
    "an empty piece": (piece("", SIZE), "the piece with the id 4096 is empty"),
    "a piece with a NUL": (piece("a\0b", SIZE), "not a SentencePiece model"),
    "a piece of 30,000 letters": (piece("x" * 30_000, SIZE), "not a SentencePiece model"),
    "a byte renamed": (raw(b'"<0x41>": ', b'"<0x4l>": '), "no byte piece <0x41>"),
    "no <unk>": (changed(partial(respell, "<unk>", 3)), "<unk> is piece none, but the model declares piece none"),
    "no <bos>": (changed(partial(respell, "<bos>", 2)), "<bos> is piece none, but the model declares piece none"),
    "no merges": (without("model", "merges"), "model.merges must be a list"),
    "merges an object": (at("model", "merges", value={}), "model.merges must be a list"),
    "merges empty": (at("model", "merges", value=[]), "0 merges, but"),
    "a merge of one part": (merges(["a"]), "must have two pieces"),
    "a merge of three": (merges(["a", "b", "c"]), "must have two pieces"),
    "a merge in three words": (merges("a b c"), "must have two pieces"),
    "a merge in one word": (changed(lambda c: c["model"]["merges"].append("ab"), older), "must have two pieces"),
    "a merge of numbers": (merges([1, 2]), "must have two pieces"),
    "a merge of lists": (merges([["a"], ["b"]]), "must have two pieces"),
    "a merge null": (merges(None), "must have two pieces"),
    "a merge of an unknown piece": (merges(["qqqq", "b"]), "'qqqq' is no piece"),
    "a merge that makes no piece": (merges(["<table>", "<table>"]), "'<table><table>' is no piece"),
    "a merge with an empty part": (merges(["", "a"]), "'' is no piece"),
    "a merge twice": (merges(["t", "h"]), "appear twice"),
    "merges in a cycle": (changed(cycle), "is no piece"),
    "merges backwards": (changed(lambda c: c["model"]["merges"].reverse()), "runs of spaces do not stand before"),
    "merges shuffled": (changed(lambda c: random.Random(0).shuffle(c["model"]["merges"])), "do not stand"),
    "added tokens an object": (at("added_tokens", value={}), "added_tokens must be a list"),
    "an added token a string": (added("<odd>"), "must be an object with content and id"),
    "an added token without id": (added({"content": "<odd>"}), "must be an object with content and id"),
    "an added token without text": (added({"id": SIZE}), "an added token without a text"),
    "an empty added token": (added(token(SIZE, "")), "an added token without a text"),
    "an added token with a surrogate": (added(token(SIZE, "\udfff")), "not valid Unicode"),
    **{
        f"an added id {id!r}": (added({**token(0, "<odd>"), "id": id}), f"added token '<odd>' has the id {id!r}")
        for id in ADDED_IDS
    },
    "an added id twice": (added(token(SIZE, "<odd>"), token(SIZE, "<even>")), f"both have the id {SIZE}"),
    "an added id far away": (added(token(2, "<odd>")), "'<bos>' and '<odd>' both have the id 2"),
    "a flag of another type": (added({**token(SIZE, "<odd>"), "special": 1}), "special of added token '<odd>' is 1"),
    **{
        f"{flag} of another type": (added({**token(SIZE, "<odd>"), flag: 1}), f"{flag} of added token '<odd>' is 1")
        for flag in ("lstrip", "rstrip", "single_word", "normalized")
    },
    "a single word with a symbol in it": (
        added(token(SIZE, "a\n", single_word=True)),
        "added token 'a\\n' has single_word=true, and one of Gemma's symbols is in it",
    ),
    "single words without end": (
        added(*(token(SIZE + i, f"{i:0200}", single_word=True) for i in range(1000))),
        "too many or too long to be looked for",
    ),
    "tokens without end": (added(token(SIZE, "~" * 2**22)), "too many or too long to be looked for"),
    "a special token that is a piece too": (
        added(token(pocket()["model"]["vocab"]["▁the"], "▁the")),
        "special token '▁the' is a piece of ordinary text too",
    ),
    "tokens found alike": (
        added(token(SIZE, "a b", False, normalized=True), token(SIZE + 1, "a▁b", False, normalized=True)),
        "added tokens 'a b' and 'a▁b', which are found alike",
    ),
    "100,000 added tokens, cut": (
        raw(b'"added_tokens": [', b'"added_tokens": ' + MANY + b', "more": ['),
        "more than 65,536",
    ),
    "70,000 added tokens": (
        changed(lambda c: c["added_tokens"].extend(token(SIZE + i, f"~{i}") for i in range(70_000))),
        "more than 65,536 added tokens",
    ),
    "tokens that nest": (
        changed(lambda c: c["added_tokens"].extend(token(SIZE + i, "~" * (i + 2)) for i in range(3000))),
        "too many or too long to be looked for",
    ),
    "normalizer a list": (at("normalizer", value=[]), "normalizer [] is not Gemma's"),
    "normalizer a string": (at("normalizer", value="Replace"), "normalizer 'Replace' is not Gemma's"),
    "normalizer NFC": (at("normalizer", value={"type": "NFC"}), "normalizer NFC"),
    "normalizers that nest": (
        at("normalizer", value=json.loads('{"type":"Sequence","normalizers":[' * 200 + "1" + "]}" * 200)),
        "normalizer Sequence (Sequence) is not Gemma's",
    ),
    "pre_tokenizer a number": (at("pre_tokenizer", value=3), "pre_tokenizer 3 is not Gemma's"),
    "pre_tokenizer inverted": (at("pre_tokenizer", "invert", value=True), "pre_tokenizer Split"),
    "decoder a list": (at("decoder", value=[]), "decoder [] is not Gemma's"),
    "decoder cut": (changed(lambda c: c["decoder"]["decoders"].pop()), "decoder Sequence (Replace, ByteFallback)"),
    "post_processor a string": (at("post_processor", value="x"), "post_processor 'x' is not Gemma's"),
    "template a string": (at("post_processor", "single", value="<bos> $A"), "post_processor TemplateProcessing"),
    "template of another token": (
        at("post_processor", "single", 0, "SpecialToken", "id", value="<mask>"),
        "is not Gemma's: <bos>, text",
    ),
    "template without text": (changed(lambda c: c["post_processor"]["single"].pop()), "is not Gemma's: <bos>, text"),
}


def readings(paths: list[str]) -> Iterator[dict[str, Any]]:
    start = memory("VmHWM")
    for path in paths:
        began, error, message = time.process_time(), "", ""
        try:
            parse_tokenizer(path)
        except BaseException as raised:
            error, message = type(raised).__name__, str(raised)
        spent = time.process_time() - began
        yield {"error": error, "message": message, "seconds": spent, "growth": memory("VmHWM") - start}


def both(paths: list[str], count: int, folder: str) -> Iterator[Any]:
    yield from readings(paths)
    yield from uses(count, folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Any], Path]:
    """The files, what became of them and then of damaged ones, and where those lay: all in one process of their own."""
    tmp_path = tmp_path_factory.mktemp("files")
    paths = [tmp_path / f"{number}.json" for number in range(len(FILES) + 2)]
    good, zeros, *others = paths
    good.write_text(json.dumps(pocket()), encoding="utf-8")
    with zeros.open("wb") as file:
        file.truncate(200 * 2**20)
    for path, (make, _) in zip(others, FILES.values(), strict=True):
        path.write_bytes(make())
    return others, in_a_child(both, [*map(str, paths)], DAMAGED, str(tmp_path)), tmp_path


def test_a_file_that_is_no_gemma_tokenizer_is_refused_in_one_line_at_once_and_in_little_memory(
    done: tuple[list[Path], list[Any], Path],
) -> None:
    others, (loaded, unread, *results), _ = done
    assert loaded["error"] == ""
    assert "209,715,200 bytes, and a Gemma 2's tokenizer.json has at most 100,663,296" in unread["message"]
    assert unread["seconds"] < 1 and unread["growth"] < 50e6
    wrong = {}
    for (case, (_, words)), path, found in zip(FILES.items(), others, results[:-DAMAGED], strict=True):
        said = found["message"]
        holds = found["error"] == "BadModelFile" and words in said and said.startswith(f"{path}: ")
        if not holds or "\n" in said or len(said) > 600 or found["seconds"] > 5 or found["growth"] > 900e6:
            wrong[case] = found
    assert wrong == {}
    assert len(FILES) >= 60


def mutated(seed: int) -> bytes:
    """The good file with some of its characters or values damaged at random."""
    rng = random.Random(seed)
    if seed % 2:
        good = bytearray(json.dumps(pocket()).encode())
        for _ in range(rng.choice((1, 2, 5))):
            place, size = rng.randrange(len(good)), rng.choice((1, 1, 4, 300))
            good[place : place + rng.choice((0, size))] = rng.choice((b"", rng.randbytes(size), b"0", b"[", b'"'))
        return bytes(good)
    content = pocket()
    odd: tuple[Any, ...] = (
        None,
        True,
        -1,
        2,
        4096,
        1.5,
        "",
        "▁",
        "the",
        "<bos>",
        "\0",
        [],
        {},
        ["t", "h"],
        "t h",
        10**20,
    )
    for _ in range(rng.choice((1, 1, 3))):
        node: Any = content
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and rng.random() < 0.9:
                node = node[key]
                continue
            if isinstance(node, dict) and rng.random() < 0.3:
                node[rng.choice(("odd", "", "<0x41>", "<eos>"))] = node.pop(key)
            else:
                node[key] = rng.choice(odd)
            break
    return json.dumps(content).encode()


def uses(count: int, folder: str) -> Iterator[str]:
    """What becomes of damaged files: "loaded", or the refusal, or how the promise was broken."""
    for seed in range(count):
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(mutated(seed))
        try:
            found = parse_tokenizer(path)
            assert found is not None
            ids = found.encode("In the beginning,  日本\n<eos> 🙂" * 3)
            assert ids[0] == found.special["bos"] and not set(ids[1:]) & {0, 1, 2}
            found.decode(range(len(found)))
            yield "loaded"
        except Exception as error:
            yield f"{type(error).__name__}: {error}"


@pytest.mark.long
def test_seventy_damaged_files_are_refused_or_keep_every_promise(
    done: tuple[list[Path], list[Any], Path],
) -> None:
    results, tmp_path = done[1][-DAMAGED:], done[2]
    refused = [result for result in results if result.startswith(f"BadModelFile: {tmp_path}") and "\n" not in result]
    assert [result for result in results if result != "loaded" and result not in refused] == []
    assert len(results) == DAMAGED and len(refused) > 20 and results.count("loaded") > 8
