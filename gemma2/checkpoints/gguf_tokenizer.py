"""Gemma's tokenizer out of a GGUF's metadata: the SentencePiece model that the file was made from, rebuilt.

A GGUF lists pieces, scores and types, and leaves out the settings of the SentencePiece model; for Gemma 2 those are
constants. Its types cannot be taken at their word: llama.cpp's converter marks `<start_of_turn>` and the like as
CONTROL when a tokenizer_config.json lies beside the model, as NORMAL when none does, and SentencePiece matches neither
in text. So what is one symbol whatever surrounds it (USER_DEFINED) is decided by place and spelling.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from gemma2.checkpoints.gguf import GGUF
from gemma2.errors import BadModelFile
from gemma2.tokenizer import CONTROL as STEERING
from gemma2.tokenizer import NAMES, Tokenizer

# The same numbers in GGUF (llama.cpp's llama_token_type) and in SentencePiece (ModelProto.SentencePiece.Type).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ARRAYS = {"tokens": "str[]", "scores": "f32[]", "token_type": "i32[]"}
# GGUF's name of a special token -> the piece that Gemma 2 uses for it.
DECLARED = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>", "eot": "<end_of_turn>"}
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
RUN = re.compile(r"\n+|\t+")
SPACE = "▁"  # U+2581, how SentencePiece writes a space
ADDED = (0.0, -1000.0)  # scores of pieces that no merge makes, as written without and with a tokenizer_config.json


def build_tokenizer(header: GGUF) -> Tokenizer:
    """The tokenizer of a GGUF. Ids of ordinary text are those of the `tokenizer.model` it was converted from.

    Raises:
        BadModelFile: no vocabulary, arrays of unequal length or another type, special tokens that are not Gemma's, or
            what `Tokenizer` refuses.
    """
    where, metadata = str(header.path), header.metadata
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise BadModelFile(f"{where}: no tokenizer in it (tokenizer.ggml.model is missing); name one with tokenizer=")
    if model.value != "llama":
        raise BadModelFile(f"{where}: tokenizer.ggml.model is {model.value!r:.80}, and Gemma 2's is 'llama' (SPM)")
    arrays = [_array(metadata, name, kind, where) for name, kind in ARRAYS.items()]
    pieces, scores, types = (list(array) for array in arrays)
    if not len(pieces) == len(scores) == len(types):
        raise BadModelFile(
            f"{where}: tokenizer.ggml has {len(pieces)} tokens, {len(scores)} scores and {len(types)} token types"
        )
    wrong = next((i for i, kind in enumerate(types) if not NORMAL <= kind <= BYTE), None)
    if wrong is not None:
        raise BadModelFile(f"{where}: token_type {types[wrong]} of token {wrong}; there are types 1 to 6")
    _check_declared(metadata, pieces, where)
    symbols = [
        _symbol(i, *symbol) for i, symbol in enumerate(zip(pieces, scores, types, _below_bytes(pieces), strict=True))
    ]
    return Tokenizer(_model_proto(symbols, bool(_flag(header, "add_space_prefix", True))), where)


def notes(header: GGUF) -> list[str]:
    """What the file does not state about its tokenizer, or states against Gemma 2, and what is done about it."""
    said = []
    if "tokenizer.ggml.add_space_prefix" not in header.metadata:
        said.append("add_space_prefix is not stated: a space is put before the text, as llama.cpp does")
    if "tokenizer.ggml.add_bos_token" not in header.metadata:
        said.append("add_bos_token is not stated: <bos> is put in front, as llama.cpp does")
    elif not _flag(header, "add_bos_token", True):
        said.append("add_bos_token is false, but Gemma 2 needs <bos>: it is put in front all the same")
    if "tokenizer.ggml.eot_token_id" not in header.metadata:
        said.append("no end-of-turn id is stated: it is that of the piece <end_of_turn>, as llama.cpp finds it")
    unstated = [name for name in ("bos", "eos") if f"tokenizer.ggml.{name}_token_id" not in header.metadata]
    if unstated:
        said.append(f"no id is stated for {' and '.join(unstated)}: those of the pieces <bos> and <eos> are taken")
    return said


def chat_tuned(header: GGUF) -> bool | None:
    """Whether the file says it was tuned for chat: it has a chat template (which is never run) or ends with a turn."""
    if "tokenizer.chat_template" in header.metadata:
        return True
    pieces, eos = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "eos_token_id"))
    ends = pieces is not None and eos is not None and pieces.value[eos.value] == DECLARED["eot"]
    return True if ends else None


def _below_bytes(pieces: Sequence[str]) -> list[bool]:
    """For each piece whether it stands before the first byte piece, where Gemma keeps what no merge makes."""
    first = next((i for i, piece in enumerate(pieces) if BYTE_PIECE.fullmatch(piece)), 0)
    return [i < first for i in range(len(pieces))]


def _symbol(i: int, piece: str, score: float, kind: int, below_bytes: bool) -> tuple[str, float, int]:
    """A piece as the SentencePiece model has it."""
    if piece in ("<pad>", "<eos>", "<bos>"):
        return piece, 0.0, CONTROL
    if piece == "<unk>":
        return piece, 0.0, UNKNOWN
    if BYTE_PIECE.fullmatch(piece):
        return piece, 0.0, BYTE
    apart = (
        kind in (CONTROL, USER_DEFINED)
        or (kind == NORMAL and below_bytes and score in ADDED)
        or (kind == NORMAL and (STEERING.fullmatch(piece) or RUN.fullmatch(piece)))
    )
    if not apart:
        return piece, float(score), kind
    # The converter writes the spaces of such pieces bare ("pre-normalize user-defined spaces").
    return piece.replace(" ", SPACE), 0.0, USER_DEFINED


def _check_declared(metadata: Mapping[str, Any], pieces: Sequence[str], where: str) -> None:
    """Every id that the file states is the piece that Gemma 2 uses for it."""
    for name, piece in DECLARED.items():
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in metadata:
            continue
        stated = metadata[key]
        token = stated.value
        if stated.type not in ("u32", "i32", "u64", "i64") or not 0 <= token < len(pieces):
            raise BadModelFile(f"{where}: {key} is {token!r:.80} ({stated.type}), no id below {len(pieces)}")
        # Chat models made by others often state the end of a turn as the end of everything.
        if pieces[token] != piece and not (name == "eos" and pieces[token] == DECLARED["eot"]):
            raise BadModelFile(f"{where}: {key} is {token}, which is {pieces[token]!r:.80} and not {piece}")


def _array(metadata: Mapping[str, Any], name: str, kind: str, where: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise BadModelFile(f"{where}: {key} is missing, so the tokenizer cannot be rebuilt")
    if metadata[key].type != kind:
        raise BadModelFile(f"{where}: {key} is of type {metadata[key].type}, and must be {kind}")
    found = metadata[key].value
    return found if kind == "str[]" else found.tolist()


def _flag(header: GGUF, name: str, absent: bool) -> bool:
    key = f"tokenizer.ggml.{name}"
    stated = header.metadata.get(key)
    if stated is None:
        return absent
    if stated.type != "bool":
        raise BadModelFile(f"{header.path}: {key} is of type {stated.type}, and must be bool")
    return bool(stated.value)


def _model_proto(symbols: Sequence[tuple[str, float, int]], space_prefix: bool) -> bytes:
    """A serialised sentencepiece.ModelProto; field numbers are those of sentencepiece_model.proto."""
    names = {text: i for i, (text, _, _) in enumerate(symbols)}
    pieces = b"".join(
        _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _integer(3, kind))
        for text, score, kind in symbols
    )
    bpe = 2
    trainer = _integer(3, bpe) + _integer(4, len(symbols)) + _integer(24, 0) + _integer(25, 1) + _integer(26, 1)
    trainer += _integer(35, 1)  # byte fallback
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        assert name in NAMES
        trainer += _integer(number, names.get(f"<{name}>", -1)) + _bytes(number + 5, f"<{name}>".encode())
    normalizer = _bytes(1, b"identity") + _integer(3, int(space_prefix)) + _integer(4, 0) + _integer(5, 1)
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % 2**64)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
