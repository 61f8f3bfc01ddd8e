"""GGUF files written byte for byte, so that one thing at a time can be wrong in them.

`File` describes a file and `File.write` gives its bytes. `small` is a header with three tensors in 1 kB, no model;
`tiny_model` is a whole Gemma 2 with the tokenizer of the pocket model. A malformed file is one of them with a change:

    small().with_tensor("a.weight", offset=16).write()
    tiny_model().without("gemma2.block_count").write()

Block sizes and ggml's numbers of types are gguf-py's, and nothing of the reader under test is used here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import sentencepiece
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemma2.load import POCKET

KINDS: Mapping[str, tuple[int, int, int]] = {  # ggml type -> its number, values and bytes of a block
    kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType
}
# Value type -> its number in a file and its code for struct.
SCALARS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
STRING, ARRAY = 8, 9

# Where a block has its float16 scales, by type: first what is multiplied, then, if the type has one, the minimum.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ3_XXS": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ3_S": (0,),
    "IQ2_S": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
FLOATS = {"F32": "<f4", "F16": "<f2"}
# Every type that may hold weights.
WEIGHTS = (*SCALES, *FLOATS, "BF16", "IQ1_M", "MXFP4", "NVFP4")


class Raw(bytes):
    """Bytes that stand in the file as they are, in place of a string, a value with its type, or a shape."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its description in the header, and its data.

    Attributes:
        shape: row-major, as in PyTorch; a `Raw` takes the place of the number of dimensions and all of them.
        kind: ggml's name of a type, or its number.
        offset: what the header states; None is where the data is.
    """

    name: str | bytes
    shape: tuple[int, ...] | Raw
    kind: str | int
    data: bytes
    offset: int | None = None


@dataclass(frozen=True)
class File:
    """A GGUF file.

    Attributes:
        pairs: key, type and value; types are those of SCALARS, "str", and any of them with [] behind it.
        alignment: how the data is laid out; `general.alignment` is a pair like any other.
        n_tensors, n_pairs: the counts stated; None is the truth.
        order: "<" little-endian, ">" big-endian.
    """

    pairs: tuple[tuple[str | bytes, str, Any], ...]
    tensors: tuple[Entry, ...] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    n_tensors: int | None = None
    n_pairs: int | None = None
    order: str = "<"

    def write(self) -> bytes:
        """The file's bytes: every tensor's data is padded, as by ggml; a file without tensors ends with its header."""
        header = self.header()
        if not self.tensors:
            return header
        return _padded(header, self.alignment) + b"".join(_padded(t.data, self.alignment) for t in self.tensors)

    def header(self) -> bytes:
        """All before the padding in front of the data."""
        order = self.order
        counts = (self.n_tensors, len(self.tensors)), (self.n_pairs, len(self.pairs))
        parts = [self.magic, struct.pack(order + "I", self.version)]
        parts += [struct.pack(order + "Q", true if stated is None else stated) for stated, true in counts]
        parts += [string(key, order) + value(kind, what, order) for key, kind, what in self.pairs]
        place = 0
        for tensor in self.tensors:
            shape = tensor.shape
            if not isinstance(shape, Raw):
                shape = Raw(struct.pack(f"{order}I{len(shape)}Q", len(shape), *reversed(shape)))
            number = KINDS[tensor.kind][0] if isinstance(tensor.kind, str) else tensor.kind
            offset = place if tensor.offset is None else tensor.offset
            parts.append(string(tensor.name, order) + shape + struct.pack(order + "IQ", number, offset))
            place += len(_padded(tensor.data, self.alignment))
        return b"".join(parts)

    def with_pair(self, key: str, kind: str, what: Any) -> File:
        """With `key` changed where it stands, or added at the end."""
        pair = (key, kind, what)
        if all(key != old for old, _, _ in self.pairs):
            return replace(self, pairs=(*self.pairs, pair))
        return replace(self, pairs=tuple(pair if old[0] == key else old for old in self.pairs))

    def without(self, *keys: str) -> File:
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair[0] not in keys))

    def value(self, key: str) -> Any:
        return next(what for name, _, what in self.pairs if name == key)

    def tensor(self, name: str) -> Entry:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def with_tensor(self, which: str, **changes: Any) -> File:
        """With fields of one tensor's entry changed."""
        changed = replace(self.tensor(which), **changes)
        return replace(self, tensors=tuple(changed if tensor.name == which else tensor for tensor in self.tensors))

    def without_tensors(self, *names: str) -> File:
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor.name not in names))

    def plus(self, *tensors: Entry) -> File:
        return replace(self, tensors=(*self.tensors, *tensors))


def string(text: str | bytes, order: str = "<") -> bytes:
    """A length and as many bytes."""
    if isinstance(text, Raw):
        return text
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack(order + "Q", len(raw)) + raw


def value(kind: str, what: Any, order: str = "<") -> bytes:
    """A value and its type before it. An array may be any iterable."""
    if isinstance(what, Raw):
        return what
    if kind == "str":
        return struct.pack(order + "I", STRING) + string(what, order)
    if not kind.endswith("[]"):
        number, code = SCALARS[kind]
        return struct.pack(f"{order}I{code}", number, what)
    items = list(what)
    element = kind.removesuffix("[]")
    number = STRING if element == "str" else SCALARS[element][0]
    head = struct.pack(order + "IIQ", ARRAY, number, len(items))
    if element == "str":
        return head + b"".join(string(item, order) for item in items)
    return head + struct.pack(f"{order}{len(items)}{SCALARS[element][1]}", *items)


def array(number: int, count: int, content: bytes = b"") -> Raw:
    """An array value as it is: the number of its elements' type, how many there are said to be, and what is there."""
    return Raw(struct.pack("<IIQ", ARRAY, number, count) + content)


def lengthy(length: int, content: bytes = b"x") -> Raw:
    """A string that is said to have `length` bytes."""
    return Raw(struct.pack("<Q", length) + content)


def dimensions(stated: int, *sizes: int) -> Raw:
    """A shape as it is in the file: how many dimensions there are said to be, and the sizes, innermost first."""
    return Raw(struct.pack(f"<I{len(sizes)}Q", stated, *sizes))


def small() -> File:
    """The shortest file with something of everything: each kind of value, and three tensors of different types."""
    return File(
        pairs=(
            ("general.architecture", "str", "gemma2"),
            ("general.name", "str", "a small file of no use"),
            ("general.file_type", "u32", 7),
            ("gemma2.block_count", "u32", 2),
            ("gemma2.attention.layer_norm_rms_epsilon", "f32", 1e-6),
            ("gemma2.attn_logit_softcapping", "f64", 50.0),
            ("gemma2.unused", "i64", -1),
            ("tokenizer.ggml.tokens", "str[]", ["<pad>", "<eos>", "▁日本"]),
            ("tokenizer.ggml.scores", "f32[]", [0.0, -1.0, -2.5]),
            ("tokenizer.ggml.token_type", "i32[]", [3, 3, 1]),
            ("tokenizer.ggml.add_bos_token", "bool", True),
        ),
        tensors=(
            Entry("a.weight", (3, 32), "Q8_0", blocks("Q8_0", 96)),
            Entry("b.weight", (2, 16), "F16", blocks("F16", 32)),
            Entry("c.weight", (32,), "F32", blocks("F32", 32)),
        ),
    )


@cache
def pocket_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of the pocket model's tokenizer, as llama.cpp's converter reads them from it."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(POCKET / "tokenizer.model"))
    ids = range(pieces.vocab_size())
    special = (pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_unused, 5), (pieces.is_byte, 6)
    types = [next((number for holds, number in special if holds(i)), 1) for i in ids]
    return [pieces.id_to_piece(i) for i in ids], [pieces.get_score(i) for i in ids], types


@cache
def tiny_model(kind: str = "F32") -> File:
    """A Gemma 2 of two layers, one local and one global, whose matrices are of ggml type `kind` and norms F32.

    Weights are random, and the same in every call. Rows are a block of the type long, at least 32 numbers.
    """
    width = max(32, KINDS[kind][1])
    shapes = {"token_embd.weight": (len(pocket_vocabulary()[0]), width), "output_norm.weight": (width,)}
    for layer in range(2):
        inside = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width // 2, width),
            "attn_v": (width // 2, width),
            "attn_output": (width, width),
            "post_attention_norm": (width,),
            "ffn_norm": (width,),
            "ffn_gate": (2 * width, width),
            "ffn_up": (2 * width, width),
            "ffn_down": (width, 2 * width),
            "post_ffw_norm": (width,),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return File(
        pairs=(*architecture(width), *tokenizer()),
        tensors=tuple(weight(name, shape, "F32" if "norm" in name else kind) for name, shape in shapes.items()),
    )


def weight(name: str, shape: tuple[int, ...], kind: str) -> Entry:
    """A tensor of random finite numbers, which depend on its name."""
    return Entry(name, shape, kind, blocks(kind, int(np.prod(shape)), zlib.crc32(name.encode())))


def architecture(width: int = 32) -> tuple[tuple[str, str, Any], ...]:
    """The keys that llama.cpp's converter writes for a Gemma 2, with the numbers of `tiny_model`."""
    return (
        ("general.architecture", "str", "gemma2"),
        ("general.type", "str", "model"),
        ("general.name", "str", "Tiny"),
        ("gemma2.context_length", "u32", 128),
        ("gemma2.embedding_length", "u32", width),
        ("gemma2.block_count", "u32", 2),
        ("gemma2.feed_forward_length", "u32", 2 * width),
        ("gemma2.attention.head_count", "u32", 4),
        ("gemma2.attention.head_count_kv", "u32", 2),
        ("gemma2.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        ("gemma2.attention.key_length", "u32", width // 4),
        ("gemma2.attention.value_length", "u32", width // 4),
        ("general.file_type", "u32", 0),
        ("gemma2.attn_logit_softcapping", "f32", 50.0),
        ("gemma2.final_logit_softcapping", "f32", 30.0),
        ("gemma2.attention.sliding_window", "u32", 16),
        ("general.quantization_version", "u32", 2),
    )


def tokenizer() -> tuple[tuple[str, str, Any], ...]:
    """The keys that llama.cpp's converter writes for the pocket model's tokenizer."""
    tokens, scores, types = pocket_vocabulary()
    return (
        ("tokenizer.ggml.model", "str", "llama"),
        ("tokenizer.ggml.pre", "str", "default"),
        ("tokenizer.ggml.tokens", "str[]", tokens),
        ("tokenizer.ggml.scores", "f32[]", scores),
        ("tokenizer.ggml.token_type", "i32[]", types),
        ("tokenizer.ggml.bos_token_id", "u32", tokens.index("<bos>")),
        ("tokenizer.ggml.eos_token_id", "u32", tokens.index("<eos>")),
        ("tokenizer.ggml.unknown_token_id", "u32", tokens.index("<unk>")),
        ("tokenizer.ggml.padding_token_id", "u32", tokens.index("<pad>")),
        ("tokenizer.ggml.add_bos_token", "bool", True),
        ("tokenizer.ggml.add_eos_token", "bool", False),
        ("tokenizer.ggml.add_space_prefix", "bool", False),
    )


def blocks(kind: str, values: int, seed: int = 0) -> bytes:
    """Random numbers as blocks of a ggml type: any bits, but finite, and between 0.001 and a few hundred in size."""
    _, in_block, size = KINDS[kind]
    count, rng = values // in_block, np.random.default_rng(seed)
    if kind in FLOATS or kind == "BF16":
        numbers = rng.normal(scale=0.1, size=values).astype("<f4")
        return (numbers.view("<u2")[1::2] if kind == "BF16" else numbers.astype(FLOATS[kind])).tobytes()
    raw = np.frombuffer(rng.bytes(count * size), np.uint8).reshape(count, size).copy()
    for which in range(len(SCALES.get(kind, (0,)))):
        _set_scales(kind, raw, which, rng.uniform(0.001, 0.01, count))
    return raw.tobytes()


def spoilt(kind: str, data: bytes, number: float, which: int = 0) -> bytes:
    """`data` with the scale of the second block (for floats, the second number) replaced by `number`, which is NaN or
    infinite; `which` is the place in SCALES."""
    _, _, size = KINDS[kind]
    raw = np.frombuffer(data, np.uint8).reshape(-1, size).copy()
    _set_scales(kind, raw[1:2], which, np.array([number]))
    return raw.tobytes()


def _set_scales(kind: str, raw: np.ndarray[Any, Any], which: int, scales: np.ndarray[Any, Any]) -> None:
    """Write one scale into each row of `raw`, a block."""
    if kind in FLOATS:
        raw[:] = scales.astype(FLOATS[kind]).view(np.uint8).reshape(raw.shape)
    elif kind == "BF16":
        raw[:] = scales.astype("<f4").view(np.uint8).reshape(-1, 4)[:, 2:]
    elif kind == "MXFP4":  # a power of two; the largest overflows with any number but 0, 0.5 and 1 of the block
        raw[:, 0] = np.where(np.isfinite(scales), 120, 255)
    elif kind == "NVFP4":  # every byte is a finite scale
        raw[:, 0:4] = 20
    elif kind == "IQ1_M":  # four bits in each of four words
        bits = scales.astype("<f2").view("<u2")
        for word in range(4):
            raw[:, 49 + 2 * word] = raw[:, 49 + 2 * word] & 15 | (bits >> 4 * word & 15) << 4
    else:
        start = SCALES[kind][which]
        raw[:, start : start + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)


def _padded(raw: bytes, alignment: int) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def split(file: File, counts: Iterable[int]) -> list[File]:
    """The file as parts of so many tensors each, as gguf-split makes them; all metadata is in the first."""
    sizes = list(counts)
    assert sum(sizes) == len(file.tensors)
    parts, start = [], 0
    for number, size in enumerate(sizes):
        numbers = (("split.no", "u16", number), ("split.count", "u16", len(sizes)))
        total = ("split.tensors.count", "i32", len(file.tensors))
        pairs = (*(file.pairs if number == 0 else ()), *numbers, total)
        parts.append(replace(file, pairs=pairs, tensors=file.tensors[start : start + size]))
        start += size
    return parts
