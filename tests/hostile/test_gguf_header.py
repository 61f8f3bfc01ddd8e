"""GGUF headers that lie, and what each is told. No file here gets as far as being looked at as a model."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gguf_files import KINDS, Entry, Raw, array, dimensions, lengthy, small, string
from tests.hostile.child import faults, merged

GOOD = small()
A, B, C = "a.weight", "b.weight", "c.weight"
FAR = 2**63
NAME, TOKENS, SCORES, BOS = "general.name", "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "gemma2.unused"
Make = Callable[[], bytes]


def stated(**changes: int | bytes | str) -> Make:
    """The good file with a field of its own changed: magic, version or a count."""
    return lambda: replace(GOOD, **changes).write()  # type: ignore[arg-type]


def with_value(what: Raw, key: str = NAME) -> Make:
    """The good file with the value of one key, and its type, as it is."""
    return lambda: GOOD.with_pair(key, "", what).write()


def with_key(key: str | bytes) -> Make:
    return lambda: replace(GOOD, pairs=(*GOOD.pairs[:2], (key, "u32", 1), *GOOD.pairs[2:])).write()


def tensor(which: str, **changes: object) -> Make:
    return lambda: GOOD.with_tensor(which, **changes).write()


def aligned(kind: str, value: object, layout: int = 32) -> Make:
    return lambda: replace(GOOD.with_pair("general.alignment", kind, value), alignment=layout).write()


def cut(size: int) -> Make:
    return lambda: GOOD.write()[:size]


def nested(depth: int) -> Raw:
    """Arrays of one array each."""
    return Raw(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0))


def odd_sized(shape: tuple[int, ...], kind: str, size: int) -> Make:
    """The good file with one more tensor whose data has another size than its shape and type need."""
    return lambda: GOOD.plus(Entry("d.weight", shape, kind, bytes(size))).write()


SHORT, BIG = (
    "bytes are not a GGUF file: the shortest header has 24",
    "a big-endian GGUF file; convert it to little-endian",
)
STRANGE = "not a GGUF file: it begins with "
FOREIGN: dict[str, tuple[Make, str]] = {
    "empty": (lambda: b"", "an empty file"),
    "1 byte": (cut(1), f"1 {SHORT}"),
    "3 bytes": (cut(3), f"3 {SHORT}"),
    "the magic alone": (cut(4), f"4 {SHORT}"),
    "cut in the version": (cut(6), f"6 {SHORT}"),
    "cut before the counts": (cut(8), f"8 {SHORT}"),
    "cut in the counts": (cut(20), f"20 {SHORT}"),
    "23 bytes": (cut(23), f"23 {SHORT}"),
    "zeros": (lambda: bytes(1000), STRANGE),
    "noise": (lambda: random.Random(0).randbytes(1000), STRANGE),
    "an HTML page": (
        lambda: b"<!DOCTYPE html><html><body>404</body></html>",
        "an HTML page, perhaps an error page that was saved",
    ),
    "an LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a Git LFS pointer, not the weights: run `git lfs pull`",
    ),
    "JSON": (lambda: b'{"architectures": ["Gemma2ForCausalLM"]}', STRANGE),
    "a zip": (lambda: b"PK\3\4" + bytes(200), STRANGE),
    "a pickle": (lambda: b"\x80\x02}q\x00." + bytes(200), STRANGE),
    "safetensors": (lambda: struct.pack("<Q", 2) + b"{}" + bytes(64), STRANGE),
    "the oldest ggml magic": (stated(magic=b"lmgg"), "a ggml file from before GGUF"),
    "GGML": (stated(magic=b"GGML"), STRANGE),
    "lower case": (stated(magic=b"gguf"), STRANGE),
    "a byte in front": (lambda: b"\0" + GOOD.write(), STRANGE),
    "a BOM in front": (lambda: b"\xef\xbb\xbf" + GOOD.write(), STRANGE),
    "FUGG": (stated(magic=b"FUGG"), BIG),
    "a big-endian file": (stated(order=">"), BIG),
    "a big-endian file of version 2": (stated(order=">", version=2), BIG),
    "a big-endian version alone": (stated(version=3 << 24), BIG),
    **{
        f"version {version}": (stated(version=version), f"GGUF version {version}; versions 2 and 3 are read")
        for version in (0, 1, 4, 255, 65539, 2**31 + 3, 2**32 - 1)
    },
}

ZERO = "the padding before the tensor data is not zero: the header describes less than it holds"
COUNTS: dict[str, tuple[Make, str]] = {
    **{
        f"{n} tensors": (stated(n_tensors=n), f"tensor count is {n:,}, and 1,040 bytes follow")
        for n in (1000, 65_536, 65_537, 2**31, FAR, FAR + 3, 2**64 - 1, 2**64 // 24 + 1)
    },
    "a tensor too many": (stated(n_tensors=4), "tensor name is 0 bytes long, and 1 to 63 are allowed"),
    "a tensor too few": (stated(n_tensors=2), ZERO),
    "no tensors, it says": (stated(n_tensors=0), ZERO),
    **{
        f"{n} pairs": (stated(n_pairs=n), f"key/value count is {n:,}, and 1,032 bytes follow")
        for n in (1000, 65_537, 2**31, FAR, FAR + 11, 2**64 - 1, 2**64 // 13 + 1)
    },
    "65,537 honest tensors": (
        lambda: replace(GOOD, tensors=tuple(Entry(f"x{i}", (8,), "F32", bytes(32)) for i in range(65_537))).write(),
        "tensor count is 65,537, and",
    ),
    "65,537 honest pairs": (
        lambda: replace(GOOD, pairs=tuple((f"x{i}", "u8", 0) for i in range(65_537))).write(),
        "key/value count is 65,537, and",
    ),
    "a pair too many": (stated(n_pairs=12), "tensor name is 844,424,930,131,968 bytes long"),
    "a pair too few": (stated(n_pairs=10), "dimensions, and ggml has 1 to 4"),
    "no pairs, it says": (stated(n_pairs=0), "tensor 'general.architecture' has 8 dimensions, and ggml has 1 to 4"),
}

KEY = "key is 0 bytes long, and 1 to 65,535 are allowed"
PAIRS: dict[str, tuple[Make, str]] = {
    "key empty": (with_key(""), KEY),
    "key of 65,536 bytes": (with_key("k" * 65_536), KEY.replace("0", "65,536", 1)),
    **{
        f"key of {n} bytes, it says": (with_key(lengthy(n)), f"key is {n:,} bytes long")
        for n in (2**20, 2**31, 2**32, FAR, 2**64 - 1, 2**64 - 8)
    },
    "key beyond the end": (with_key(lengthy(60_000)), "key needs 60,000 bytes, and"),
    "key with a NUL": (with_key("general\0name"), r"key 'general\x00name' has a NUL in it"),
    "key not UTF-8": (with_key(b"gener\xe4l"), r"key is not UTF-8: b'gener\xe4l'"),
    "key twice": (with_key(NAME), "key 'general.name' appears twice"),
    "architecture twice": (with_key("general.architecture"), "key 'general.architecture' appears twice"),
    "key that steers a terminal, twice": (
        lambda: replace(GOOD, pairs=(("\x1b[31m\n", "u8", 1),) * 2).write(),
        r"key '\x1b[31m\n' appears twice",
    ),
    **{
        f"value type {n}": (with_value(Raw(struct.pack("<I", n) + bytes(8))), f"has value type {n}, and there are only")
        for n in (13, 14, 255, 2**31, 2**32 - 1)
    },
    **{
        f"string of {n} bytes, it says": (with_value(Raw(struct.pack("<I", 8) + lengthy(n))), f"is {n:,} bytes long")
        for n in (2**24 + 1, 2**31, FAR, 2**64 - 1, 2**64 - 8)
    },
    "string beyond the end": (with_value(Raw(struct.pack("<I", 8) + lengthy(2**20))), "needs 1,048,576 bytes, and"),
    "string over 16 MB": (with_value(Raw(struct.pack("<I", 8) + string("x" * (2**24 + 1)))), "16,777,217 bytes long"),
    "string not UTF-8": (
        lambda: GOOD.with_pair(NAME, "str", b"na\xefve").write(),
        "value of 'general.name' is not UTF-8",
    ),
    "string of a surrogate": (lambda: GOOD.with_pair(NAME, "str", b"\xed\xa0\x80").write(), "is not UTF-8"),
    "string overlong": (lambda: GOOD.with_pair(NAME, "str", b"\xc0\x80").write(), "is not UTF-8"),
    "string UTF-16": (lambda: GOOD.with_pair(NAME, "str", "tiny".encode("utf-16")).write(), "is not UTF-8"),
    **{
        f"bool {n}": (
            with_value(Raw(struct.pack("<IB", 7, n)), BOS),
            f"value of 'gemma2.unused' is a bool of value {n}, neither 0 nor 1",
        )
        for n in (2, 7, 255)
    },
    "bool 7 in an array": (with_value(array(7, 3, b"\0\1\7")), "is a bool of value 7, neither 0 nor 1"),
}

ARRAYS: dict[str, tuple[Make, str]] = {
    **{
        f"{n} bytes in an array": (with_value(array(0, n, b"x")), words)
        for n, words in {
            2**20: "value of 'general.name' needs 1,048,576 bytes, and",
            2**22 + 1: "value of 'general.name' has 4,194,305 elements, more than 4,194,304",
            2**32: "has 4,294,967,296 elements, more than",
            FAR: "elements, more than",
            2**64 - 1: "elements, more than",
        }.items()
    },
    "u64 array whose size wraps to 8": (with_value(array(10, 2**61 + 1, bytes(8))), "elements, more than 4,194,304"),
    "f32 array whose size wraps to 0": (with_value(array(6, 2**62)), "elements, more than 4,194,304"),
    "f64 array beyond the end": (with_value(array(12, 1000)), "value of 'general.name' needs 8,000 bytes, and"),
    "array of one element more than there are": (with_value(array(6, 4, bytes(12)), SCORES), "key is "),
    "array of 4,194,305 honest bytes": (with_value(array(0, 2**22 + 1, bytes(2**22 + 1))), "has 4,194,305 elements"),
    **{
        f"{n} strings in an array": (
            with_value(array(8, n, string("x"))),
            f"length of value of 'general.name' is {n:,}, and",
        )
        for n in (1000, 2**20 + 1, 2**31, 2**61 + 1, FAR, 2**64 - 1)
    },
    "string too many": (with_value(array(8, 4, string("x") * 3), TOKENS), "key is 25,769,803,785 bytes long, and 1 to"),
    "string too many, at the end": (
        lambda: replace(GOOD, pairs=((TOKENS, "", array(8, 4, string("x" * 9) * 3)),), tensors=()).write(),
        "length of element 3 of value of 'tokenizer.ggml.tokens' needs 8 bytes, and 0 are left: cut short or damaged",
    ),
    "element of 65,537 bytes": (
        lambda: GOOD.with_pair(TOKENS, "str[]", ["<pad>", "x" * 65_537]).write(),
        "element 1 of value of 'tokenizer.ggml.tokens' is 65,537 bytes long, and 0 to 65,536 are allowed",
    ),
    "element of 2^63 bytes": (with_value(array(8, 1, lengthy(FAR))), "element 0 of value of 'general.name' is 9,223"),
    "element of 2^64-1 bytes": (with_value(array(8, 1, lengthy(2**64 - 1))), "element 0 of value of 'general.name' is"),
    "element of 2^64-8 bytes": (with_value(array(8, 1, lengthy(2**64 - 8))), "element 0 of value of 'general.name' is"),
    "element beyond the end": (with_value(array(8, 1, lengthy(60_000))), "element 0 of value of 'general.name' needs"),
    "element not UTF-8": (
        lambda: GOOD.with_pair(TOKENS, "str[]", ["<pad>", b"<\xffos>", "x"]).write(),
        r"element 1 of value of 'tokenizer.ggml.tokens' is not UTF-8: b'<\xffos>'",
    ),
    "1,048,577 strings in two arrays": (
        lambda: GOOD.with_pair("more", "str[]", [""] * (2**20 - 2)).write(),
        "value of 'more' makes 1,048,577 strings in arrays, and 1,048,576 are taken",
    ),
    "unknown elements": (with_value(array(13, 1, bytes(8))), "value of 'general.name' has value type 13"),
    "no unknown elements": (with_value(array(13, 0)), "value of 'general.name' has value type 13"),
    "elements of type 2^32-1": (with_value(array(2**32 - 1, 1)), "has value type 4294967295"),
    **{f"arrays {n} deep": (with_value(nested(n)), "an array of arrays, which") for n in (1, 2, 400, 2000, 100_000)},
    "no arrays in an array": (with_value(array(9, 0)), "an array of arrays, which no model file has"),
}

POWER = "it must be a u32 power of two up to 1,048,576"
ALIGNMENTS: dict[str, tuple[Make, str]] = {
    **{
        f"alignment {n}": (aligned("u32", n), f"general.alignment is {n} (u32); {POWER}")
        for n in (0, 3, 13, 33, 48, 2**20 + 1, 2**21, 2**31, 2**32 - 1)
    },
    **{
        f"alignment of type {kind}": (aligned(kind, what), f"general.alignment is {shown}; {POWER}")
        for kind, what, shown in (
            ("i32", 32, "32 (i32)"),
            ("u64", 32, "32 (u64)"),
            ("u8", 32, "32 (u8)"),
            ("f32", 32.0, "32.0 (f32)"),
            ("str", "32", "'32' (str)"),
            ("bool", True, "True (bool)"),
            ("u32[]", [32], "an array of 1 (u32[])"),
            ("u32[]", [32] * 10_000, "an array of 10,000 (u32[])"),
            ("str[]", ["32"], "an array of 1 (str[])"),
        )
    },
    "alignment twice": (
        lambda: replace(GOOD, pairs=(("general.alignment", "u32", 32),) * 2).write(),
        "key 'general.alignment' appears twice",
    ),
    "alignment 1, laid out at 32": (aligned("u32", 1), "has offset 128, and must have 102"),
    "alignment 16, laid out at 32": (aligned("u32", 16), "has offset 128, and must have 112"),
    # These offsets are also multiples of 64, so only where the data begins can show it.
    "alignment 64, laid out at 32": (
        lambda: GOOD.with_pair(NAME, "str", "x" * 50).with_pair("general.alignment", "u32", 64).write(),
        ZERO,
    ),
    "alignment 128, laid out at 32": (
        aligned("u32", 128),
        "tensor 'c.weight' has offset 192, and must have 256",
    ),
    "laid out at 64, without a word": (lambda: replace(GOOD, alignment=64).write(), "32 bytes after the last tensor"),
}

LONG = "tensor name is 64 bytes long, and 1 to 63 are allowed"
NAMES: dict[str, tuple[Make, str]] = {
    "name empty": (tensor(B, name=""), LONG.replace("64", "0", 1)),
    "name of 64 bytes": (tensor(B, name="n" * 64), LONG),
    "name of 200 bytes": (tensor(B, name="n" * 200), LONG.replace("64", "200")),
    **{
        f"name of {n} bytes, it says": (tensor(B, name=lengthy(n)), f"tensor name is {n:,} bytes long")
        for n in (2**20, 2**31, FAR, 2**64 - 1, 2**64 - 8)
    },
    "name with a NUL": (tensor(B, name="b\0.weight"), r"tensor name 'b\x00.weight' has a NUL in it"),
    "name not UTF-8": (tensor(B, name=b"b\xff"), r"tensor name is not UTF-8: b'b\xff'"),
    "name twice": (tensor(B, name=A), "tensor 'a.weight' appears twice"),
    "name twice, the whole tensor": (lambda: GOOD.plus(GOOD.tensor(C)).write(), "tensor 'c.weight' appears twice"),
    "name twice, steering a terminal": (
        lambda: GOOD.with_tensor(A, name="\x1b[2J").with_tensor(B, name="\x1b[2J").write(),
        r"tensor '\x1b[2J' appears twice",
    ),
}

TOO = "each size must be 1 to 2^40"
SHAPES: dict[str, tuple[Make, str]] = {
    **{
        f"{n} dimensions": (tensor(B, shape=dimensions(n, *sizes)), f"tensor 'b.weight' has {n} dimensions, and ggml")
        for n, sizes in {0: (), 5: (16, 2, 1, 1, 1), 40: (1,) * 40, 65: (1,) * 65, 1000: (16, 2)}.items()
    },
    "2^32-1 dimensions": (tensor(B, shape=dimensions(2**32 - 1, 16, 2)), "has 4294967295 dimensions, and ggml"),
    "a dimension too few": (
        tensor(B, shape=dimensions(1, 16, 2)),
        "tensor 'b.weight' has rows of 16, not a whole number of Q4_0",
    ),
    "a dimension too many": (
        tensor(B, shape=dimensions(3, 16, 2)),
        "tensor name is 8,388,068,008,349,085,283 bytes long",
    ),
    "rows of 0": (tensor(B, shape=(2, 0), data=b""), f"tensor 'b.weight' has shape [0, 2]; {TOO}"),
    "0 rows": (tensor(B, shape=(0, 16), data=b""), f"tensor 'b.weight' has shape [16, 0]; {TOO}"),
    "nothing but zeros": (tensor(B, shape=(0, 0, 0, 0), data=b""), TOO),
    **{
        f"a size of {n}": (tensor(B, shape=(n, 16)), f"has shape [16, {n}]; {TOO}")
        for n in (2**40 + 1, 2**62, FAR, 2**64 - 1, 2**64 - 2)
    },
    **{
        f"sizes whose product is {what}": (tensor(C, shape=shape), words)
        for what, shape, words in (
            ("2^64", (2**32, 2**32), "tensor 'c.weight' ends at byte 73,786,976,294,838,207,392"),
            ("2^63", (2**31, 2**32), "tensor 'c.weight' ends at byte"),
            ("2^63 - 2^32", (2**31 - 1, 2**32), "tensor 'c.weight' ends at byte"),
            ("2^80", (2**40, 2**40, 1, 32), "tensor 'c.weight' ends at byte"),
            ("2^160", (2**40,) * 4, "tensor 'c.weight' ends at byte"),
            ("4 after wrapping", (2**40, 2**24 + 1, 4), "tensor 'c.weight' ends at byte"),
            ("2^62, its bytes 2^64", (2**40, 2**22), "tensor 'c.weight' ends at byte"),
            ("2^33 rows of 1", (2**33, 1), "tensor 'c.weight' ends at byte 34,359,"),
        )
    },
    "blocks whose bytes wrap to 0": (tensor(A, shape=(2**40, 2**24, 32)), "tensor 'a.weight' ends at byte"),
    "sums that wrap": (
        lambda: GOOD.plus(*(Entry(f"x{i}", (2**40, 2**20), "F32", b"", i * 2**62 + 320) for i in range(4))).write(),
        "tensor 'x0' ends at byte",
    ),
    "smaller than its data": (tensor(A, shape=(2, 32)), "tensor 'b.weight' has offset 128, and must have 96"),
    "larger than its data": (tensor(A, shape=(4, 32)), "tensor 'b.weight' has offset 128, and must have 160"),
    "longer rows than its data": (
        tensor(A, shape=(3, 64)),
        "tensor 'b.weight' has offset 128, and must have 224",
    ),
    "the last larger than its data": (tensor(C, shape=(33,)), "tensor 'c.weight' ends at byte"),
    "the last far larger": (tensor(C, shape=(2**40,)), "tensor 'c.weight' ends at byte"),
    "the last smaller than its data": (
        tensor(C, shape=(24,)),
        "32 bytes after the last tensor, which no tensor accounts",
    ),
    "the last of one number": (tensor(C, shape=(1,)), "124 bytes after the last tensor"),
    **{
        f"{kind} rows of {row}": (
            odd_sized((2, row), kind, KINDS[kind][2] * 2),
            f"tensor 'd.weight' has rows of {row}, not a whole number of {kind} blocks of {KINDS[kind][1]}",
        )
        for kind, row in (("Q8_0", 33), ("Q4_0", 16), ("Q4_K", 32), ("Q6_K", 255), ("IQ4_NL", 31), ("MXFP4", 1))
    },
}

TYPES: dict[str, tuple[Make, str]] = {
    **{
        f"ggml type {n}": (
            tensor(B, kind=n),
            f"tensor 'b.weight' is of ggml type {n}, a type that this program does not know",
        )
        for n in (42, 99, 255, 2**31, 2**32 - 1)
    },
    **{
        f"ggml type {n}, {name}": (
            tensor(B, kind=n),
            f"tensor 'b.weight' is of ggml type {n} ({name}), a type that holds no weights",
        )
        for n, name in {
            4: "Q4_2",
            5: "Q4_3",
            9: "Q8_1",
            15: "Q8_K",
            24: "I8",
            25: "I16",
            26: "I32",
            27: "I64",
            28: "F64",
            31: "Q4_0_4_4",
            32: "Q4_0_4_8",
            33: "Q4_0_8_8",
            36: "IQ4_NL_4_4",
            37: "IQ4_NL_4_8",
            38: "IQ4_NL_8_8",
            41: "Q1_0",
        }.items()
    },
    "F16 labelled F32": (tensor(B, kind="F32"), "tensor 'c.weight' has offset 192, and must have 256"),
    "F32 labelled F16": (tensor(C, kind="F16"), "64 bytes after the last tensor"),
    "Q8_0 labelled Q4_0": (tensor(A, kind="Q4_0"), "tensor 'b.weight' has offset 128, and must have 64"),
    "Q8_0 labelled F16": (tensor(A, kind="F16"), "tensor 'b.weight' has offset 128, and must have 192"),
    "Q8_0 labelled IQ2_XXS": (
        tensor(A, kind="IQ2_XXS"),
        "tensor 'a.weight' has rows of 32, not a whole number of IQ2_XXS",
    ),
}

PLACES: dict[str, tuple[Make, str]] = {
    "offset past its place": (tensor(B, offset=129), "tensor 'b.weight' has offset 129, and must have 128"),
    "offset 16 past its place": (tensor(B, offset=144), "tensor 'b.weight' has offset 144, and must have 128"),
    "offset 32 past its place": (tensor(B, offset=160), "tensor 'b.weight' has offset 160, and must have 128"),
    "offset before its place": (tensor(B, offset=96), "tensor 'b.weight' has offset 96, and must have 128"),
    "offset unpadded": (tensor(B, offset=102), "tensor 'b.weight' has offset 102, and must have 128"),
    "offset onto another": (tensor(B, offset=0), "tensor 'b.weight' has offset 0, and must have 128"),
    "offset of the next": (tensor(A, offset=128), "tensor 'a.weight' has offset 128, and must have 0"),
    "offsets exchanged": (
        lambda: GOOD.with_tensor(B, offset=192).with_tensor(C, offset=128).write(),
        "tensor 'b.weight' has offset 192, and must have 128",
    ),
    "offset beyond the end": (tensor(C, offset=10**6), "has offset 1,000,000, and must have 192"),
    "offset 2^63": (tensor(C, offset=FAR), f"has offset {FAR:,}, and must have 192"),
    "offset 2^64-1": (tensor(C, offset=2**64 - 1), f"has offset {2**64 - 1:,}, and must have 192"),
    "offset 2^64-32, before the data": (
        tensor(A, offset=2**64 - 32),
        f"has offset {2**64 - 32:,}, and must have 0",
    ),
    "all offsets 32 on": (
        lambda: replace(GOOD, tensors=tuple(replace(GOOD.tensor(n), offset=o) for n, o in ((A, 32), (B, 160)))).write(),
        "tensor 'a.weight' has offset 32, and must have 0",
    ),
    "a byte of the data missing": (lambda: GOOD.write()[:-1], "cut short, so download or copy it again"),
    "half of the data missing": (lambda: GOOD.write()[:-160], "cut short, so download or copy it again"),
    "all data missing": (lambda: GOOD.header(), "tensor 'a.weight' ends at byte"),
    "a block after the end": (lambda: GOOD.write() + bytes(32), "32 bytes after the last tensor, which no tensor"),
    "a zip after the end": (lambda: GOOD.write() + b"PK\3\4" + bytes(500), "504 bytes after the last tensor"),
    "a megabyte after the end": (lambda: GOOD.write() + bytes(10**6), "1,000,000 bytes after the last tensor"),
    "a file after the file": (lambda: GOOD.write() * 2, "bytes after the last tensor, which no tensor accounts for"),
    "padding not zero": (lambda: b"\1".join((GOOD.header(), GOOD.write()[len(GOOD.header()) + 1 :])), ZERO),
}
HEADERS = merged(FOREIGN, COUNTS, PAIRS, ARRAYS, ALIGNMENTS, NAMES, SHAPES, TYPES, PLACES)


@pytest.mark.long
def test_every_lie_in_a_header_is_named_at_once_and_in_little_memory(tmp_path: Path) -> None:
    assert faults(HEADERS, tmp_path) == {}
