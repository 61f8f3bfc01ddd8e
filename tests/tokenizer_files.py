"""tokenizer.json files as transformers writes them, and random text out of what tokenizers get wrong."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from gemma2.checkpoints.sentencepiece_proto import NORMAL, read_proto
from gemma2.load import POCKET

SPECIAL = {"<pad>", "<eos>", "<bos>", "<unk>", "<mask>"}


def token(id: int, content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": id, "content": content, **plain, **flags}


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order of its id."""
    return [
        (piece[:n], piece[n:])
        for piece in vocabulary
        for n in range(1, len(piece))
        if piece[:n] in vocabulary and piece[n:] in vocabulary
    ]


def fast(proto: bytes, merges: bool = True) -> dict[str, Any]:
    """What `AutoTokenizer.from_pretrained(folder).save_pretrained` of transformers 5 writes for a tokenizer.model.

    Without merges for `older`, which makes its own.
    """
    found = read_proto(proto, "given")
    vocabulary = {piece: i for i, piece in enumerate(found.pieces)}
    kinds = found.kinds.tolist()
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            token(i, piece, piece in SPECIAL)
            for i, piece in enumerate(found.pieces)
            if kinds[i] != NORMAL and not piece.startswith("<0x")
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, {"SpecialToken": {"id": "<bos>", "type_id": 1}}, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": list(map(list, _merges(vocabulary))) if merges else [],
        },
    }


_POCKET = json.dumps(fast((POCKET / "tokenizer.model").read_bytes()))


def pocket() -> dict[str, Any]:
    """The pocket model's tokenizer.json, to be changed."""
    content: dict[str, Any] = json.loads(_POCKET)
    return content


def older(content: dict[str, Any]) -> dict[str, Any]:
    """The same as transformers 4 wrote it, and Google published it: merges by score, in one string each, and a tab for
    the byte 9."""
    content["pre_tokenizer"] = None
    model, symbols = content["model"], {added["content"] for added in content["added_tokens"]}
    model["vocab"] = {"\t" if piece == "<0x09>" else piece: i for piece, i in model["vocab"].items()}
    first = model["vocab"]["<0xFF>"] + 1

    def order(merge: tuple[str, str]) -> tuple[int, int, int]:
        whole = "".join(merge)
        return 0 if whole in symbols else first - model["vocab"][whole], len(merge[0]), len(merge[1])

    model["merges"] = [" ".join(merge) for merge in sorted(_merges(model["vocab"]), key=order, reverse=True)]
    del model["ignore_merges"]
    return content


def chatml(content: dict[str, Any]) -> dict[str, Any]:
    """The same with the tokens that a ChatML fine-tune adds, and two that transformers' `add_tokens` adds."""
    size = len(content["model"]["vocab"])
    more = [token(size, "<|im_start|>"), token(size + 1, "<|im_end|>")]
    more += [token(size + 2, "<tool call>", False), token(size + 3, "wherefore art", False, normalized=True)]
    content["added_tokens"] += more
    return content


def write(folder: Path, content: Any, name: str = "tokenizer.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "etaoin shrdlu ",
    "0123456789.,",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя ",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي ",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "अआइईउऊएकखगघचछजञ्ािीु",
    "日本語中文字漢字的一是不了人我在有他这",
    "ひらがなカタカナ",
    "한국어조선말가나다라",
    "🙂😀👍🏽👨‍👩‍👧🇩🇪❤️",
    "\u0301\u0308\u0327e\u0301a\u030a",
    "!?#$%&*()-_=+[]{};:'\"\\|/<>~`^",
    "\u200d\u200b\ufeff\u00a0\u3000\x00\x7f\x01\x1b",
    "กขฃคฅฆงจⅷ①½²ſﬁÅ",
)
COMMON = re.split(
    r"\s",
    "in the beginning God created heaven and earth And said Let there be light thou shalt unto def return self "
    "banana ananas abababab aaaaaaa hahahaha www. 1234567890 3.14 don't naïve café straße Привет мир こんにちは",
)
SPELLINGS = (
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused98>", "<unused99>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_turn", "end_of_turn>", "[toxicity=0]", "<table>", "</table>"),
    *("<s>", "</s>", "<h1>", "<b", "<0x41>", "<0x0A>", "<0xZZ>", "<0x", "▁", "▁▁", "▁▁▁", "▁" * 16, "▁ ▁", "\r\n"),
    *("<|im_start|>", "<|im_end|>", "<|im_", "<tool call>", "<tool▁call>", "wherefore art", "wherefore▁art"),
)
SPACES = (1, 1, 2, 3, 4, 7, 8, 15, 16, 17, 30, 31, 32, 33, 47, 62, 63, 64, 70)


def texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)

    def part() -> str:
        chance = source.random()
        if chance < 0.35:
            return (" " if chance < 0.1 else "") + source.choice(COMMON)
        if chance < 0.45:
            return " " * source.choice(SPACES)
        if chance < 0.54:
            return source.choice("\n\n\t") * source.choice((1, 1, 2, 3, 5, 31, 32, 40))
        if chance < 0.66:
            return source.choice(SPELLINGS)
        if chance < 0.95:
            letters = source.choice(ALPHABETS)
            some = "".join(source.choice(letters) for _ in range(source.randrange(1, 12)))
            return some if chance < 0.92 else some[:3] * source.randrange(2, 12)
        return chr(source.choice((source.randrange(0x20, 0xD800), source.randrange(0xE000, 0x110000))))

    return ["".join(part() for _ in range(source.randrange(1, 14))) for _ in range(count)]
