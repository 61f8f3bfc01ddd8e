"""Gemma's tokenizer and a GGUF's metadata: the SentencePiece model is rebuilt from them, and they are made from it.

A GGUF lists pieces, scores and types, and leaves out the settings of the SentencePiece model; for Gemma 2 those are
constants. Its types cannot be taken at their word: llama.cpp's converter marks `<start_of_turn>` and the like as
CONTROL when a tokenizer_config.json lies beside the model, as NORMAL when none does, and SentencePiece matches neither
in text. So what is one symbol whatever surrounds it (USER_DEFINED) is decided by spelling and by place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2.checkpoints.added_tokens import LONGEST
from gemma2.checkpoints.gguf import GGUF, Value
from gemma2.checkpoints.sentencepiece_proto import (
    BYTE,
    BYTE_PIECE,
    CONTROL,
    NORMAL,
    SPECIAL,
    SYMBOL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    write_proto,
)
from gemma2.checkpoints.with_symbols import in_effect, tokenizer_with
from gemma2.checkpoints.with_symbols import is_gemmas as is_gemmas_symbol
from gemma2.errors import BadModelFile
from gemma2.symbols import SPACE, Symbol
from gemma2.templates import is_gemmas
from gemma2.tokenizer import CONTROL as STEERING
from gemma2.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
ARRAYS = {"tokens": "str[]", "scores": "f32[]", "token_type": "i32[]"}  # types are numbered as in SentencePiece
# GGUF's name of a special token -> the piece that Gemma 2 uses for it.
DECLARED = {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "eot": "<end_of_turn>"}
ENDS = ("eos", "eot", "eom")  # GGUF's names of what a text ends at
# Pieces at which llama.cpp ends a text whatever the keys say (src/llama-vocab.cpp, special_eog_ids).
ENDINGS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>")
# The key with which this project states all ids at which a text ends, where GGUF's own keys have no room for them.
END_IDS = "gemma2.end_token_ids"
ADDED = -1000.0  # the score that llama.cpp's converter gives to what a tokenizer_config.json adds to the pieces
PADDED = -10000.0  # and to `[PAD4097]` and the like, with which it fills the rows of an embedding that have no piece
# The key with which this project says how added tokens are found, where that is not by their types; JSON. Other readers
# leave it alone.
AS_ADDED = "gemma2.added_tokens"
ELSEWHERE = "name a tokenizer.model with tokenizer="


def build_tokenizer(header: GGUF) -> Tokenizer:
    """The tokenizer of a GGUF. Its ids are those of the `tokenizer.model` the file was converted from.

    Raises:
        BadModelFile: no vocabulary, arrays of unequal length or another type, special tokens that are not Gemma's, or
            what `Tokenizer` refuses; or not one piece for each row of the embedding.
    """
    found = _vocabulary(header)
    listed, embedding = len(header.metadata[PREFIX + "tokens"].value), header.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != listed:
        raise BadModelFile(
            f"{header.path}: {listed} pieces, but the embedding has {embedding.shape[0]} rows; {ELSEWHERE}"
        )
    try:
        return _with_symbols(header, found).for_rows(listed)
    except BadModelFile as error:
        raise BadModelFile(f"{error}; {ELSEWHERE}") from None


def tokenizer_model(header: GGUF) -> bytes:
    """The bytes of a `tokenizer.model` for the tokenizer of a GGUF. Raises BadModelFile as `build_tokenizer`."""
    return write_proto(_vocabulary(header))


def _with_symbols(header: GGUF, found: Vocabulary) -> Tokenizer:
    """The tokenizer, with what the file says of added tokens that types of pieces cannot."""
    where, kinds = str(header.path), found.kinds
    told = _told(header, found.pieces)
    typed = [
        Symbol(found.pieces[i], i) for i in np.flatnonzero(kinds == USER_DEFINED).tolist() if " " in found.pieces[i]
    ]
    if not told and not typed:
        return Tokenizer(write_proto(found), where)
    symbol_kinds = (CONTROL, UNKNOWN, USER_DEFINED)
    own = [
        Symbol(p, i, special=kind == CONTROL)
        for i, (p, kind) in enumerate(zip(found.pieces, kinds, strict=True))
        if kind in symbol_kinds
    ]
    symbols = in_effect(own, {symbol.text: symbol for symbol in told or typed})
    return tokenizer_with(found, [p if is_gemmas_symbol(p) else "" for p in found.pieces], symbols, where, ())


def _told(header: GGUF, pieces: Sequence[str]) -> list[Symbol]:
    """The added tokens that the file lists. Each must be the piece of its id, or one that has no spelling there."""
    stated = header.metadata.get(AS_ADDED)
    if stated is None:
        return []
    try:
        told = [Symbol(*each[:6]) for each in json.loads(stated.value)]
        good = all(_is_sound(symbol, pieces) for symbol in told) and len({s.id for s in told}) == len(told)
    except (TypeError, ValueError, RecursionError):
        good = False
    if not good or sum(len(s.text) for s in told) > LONGEST[0]:
        raise BadModelFile(f"{header.path}: {AS_ADDED} is {stated.value!r:.80}, which is damaged; {ELSEWHERE}")
    return told


def _is_sound(symbol: Symbol, pieces: Sequence[str]) -> bool:
    text, id = symbol.text, symbol.id
    flags = (symbol.normalized, symbol.lstrip, symbol.rstrip, symbol.single_word)
    if type(text) is not str or not text or type(id) is not int or {*map(type, flags)} != {bool}:
        return False
    return 0 <= id < len(pieces) and (
        pieces[id] == unspelled(id) or text.replace(" ", SPACE) == pieces[id].replace(" ", SPACE)
    )


def unspelled(id: int) -> str:
    """Stands for an added token whose spelling another token has already: a GGUF has one of each."""
    return f"[added {id}]"


def notes(header: GGUF) -> list[str]:
    """What the file does not state about its tokenizer, or states against Gemma 2, and what is done about it."""
    metadata, said = header.metadata, []
    if PREFIX + "add_space_prefix" not in metadata:
        said.append(
            "add_space_prefix is not stated: a space is put before every text, as by llama.cpp, though Gemma 2 was "
            f"trained without; if that is not wanted, {ELSEWHERE}"
        )
    elif _flag(header, "add_space_prefix", True):
        said.append("add_space_prefix is true: a space is put before every text, though Gemma 2 was trained without")
    if PREFIX + "add_bos_token" not in metadata:
        said.append("add_bos_token is not stated: <bos> is put in front, as by llama.cpp")
    elif not _flag(header, "add_bos_token", True):
        said.append("add_bos_token is false, but Gemma 2 needs <bos>: it is put in front all the same")
    if _flag(header, "add_eos_token", False):
        said.append("add_eos_token is true, but Gemma 2 was trained without: no <eos> is put behind a prompt")
    tokens, types = (metadata.get(PREFIX + name) for name in ("tokens", "token_type"))
    pieces = tokens.value if tokens is not None and tokens.type == ARRAYS["tokens"] else []
    if PREFIX + "eot_token_id" not in metadata and DECLARED["eot"] in pieces:
        said.append("no end-of-turn id is stated: it is that of the piece <end_of_turn>, as llama.cpp finds it")
    unstated = [name for name in ("bos", "eos") if f"{PREFIX}{name}_token_id" not in metadata]
    if unstated:
        said.append(
            f"no {' or '.join(unstated)} id is stated: "
            f"{' and '.join(DECLARED[name] for name in unstated)} as spelled, where llama.cpp takes Llama's"
        )
    if types is not None and types.type == ARRAYS["token_type"] and len(types.value) == len(pieces):
        control = [pieces[i] for i in np.flatnonzero(types.value == CONTROL)]
        foreign = [piece for piece in control if piece not in SPECIAL and not SYMBOL.fullmatch(piece)]
        if foreign:
            listed = ", ".join(map(repr, foreign[:3])) + (", ..." if foreign[3:] else "")
            said.append(
                f"control pieces that Gemma 2 does not have ({listed:.200}): a text is read as one with special=True"
            )
    ends = [pieces[i] for i in sorted(end_ids(header)) if pieces[i] not in (DECLARED["eos"], DECLARED["eot"])]
    if ends:
        said.append(f"a text also ends at {', '.join(map(repr, ends)):.200}")
    normal = [pieces[i] for i in sorted(end_ids(header)) if types is not None and types.value[i] == NORMAL]
    normal = [piece for piece in normal if piece not in SPECIAL and not SYMBOL.fullmatch(piece)]
    if normal:
        said.append(f"{', '.join(map(repr, normal)):.200} is of type NORMAL, and taken for a control piece")
    return said


def chat_template(header: GGUF) -> str | None:
    """The chat template in the file, which is never run."""
    stated = header.metadata.get("tokenizer.chat_template")
    return stated.value if stated is not None and stated.type == "str" else None


def end_ids(header: GGUF) -> frozenset[int]:
    """The ids at which the file says that a text ends: those at which llama.cpp does, and those of a key of this
    project."""
    stated, tokens = header.metadata.get(END_IDS), header.metadata.get(PREFIX + "tokens")
    found = llama_cpp_end_ids(header.metadata)
    if stated is None or stated.type != "u32[]" or tokens is None or tokens.type != ARRAYS["tokens"]:
        return found
    return found | {id for id in stated.value.tolist() if id < len(tokens.value)}


def llama_cpp_end_ids(metadata: Mapping[str, Value]) -> frozenset[int]:
    """The ids at which llama.cpp ends a text: those that GGUF's keys state, and pieces at which it always ends one."""
    tokens = metadata.get(PREFIX + "tokens")
    pieces = tokens.value if tokens is not None and tokens.type == ARRAYS["tokens"] else []
    stated = [metadata.get(f"{PREFIX}{name}_token_id") for name in ENDS]
    found = {value.value for value in stated if value is not None and value.type == "u32" and value.value < len(pieces)}
    found = {i for i in found if pieces[i] not in SPECIAL or pieces[i] == DECLARED["eos"]}
    return frozenset(found | {i for i, piece in enumerate(pieces) if piece in ENDINGS})


def chat_tuned(header: GGUF) -> bool | None:
    """Whether the file says it was tuned for chat: it has Gemma's chat template or ends with a turn."""
    template = chat_template(header)
    if template is not None and is_gemmas(template):
        return True
    pieces, eos = (header.metadata.get(PREFIX + name) for name in ("tokens", "eos_token_id"))
    if pieces is None or eos is None or pieces.type != "str[]" or eos.type != "u32" or eos.value >= len(pieces.value):
        return None
    return True if pieces.value[eos.value] == DECLARED["eot"] else None


def _vocabulary(header: GGUF) -> Vocabulary:
    """Pieces, scores and SentencePiece types as the SentencePiece model had them."""
    where, metadata = str(header.path), header.metadata
    model = metadata.get(PREFIX + "model")
    if model is None:
        raise BadModelFile(f"{where}: no tokenizer in it ({PREFIX}model is missing); {ELSEWHERE}")
    if model != Value("str", "llama"):
        raise BadModelFile(f"{where}: {PREFIX}model is {model}, and Gemma 2's is 'llama' (SentencePiece); {ELSEWHERE}")
    tokens, scores, types = (_array(metadata, name, kind, where) for name, kind in ARRAYS.items())
    if not len(tokens) == len(scores) == len(types):
        raise BadModelFile(
            f"{where}: {PREFIX}tokens has {len(tokens)} entries, scores {len(scores)} and token_type {len(types)}; "
            f"{ELSEWHERE}"
        )
    unknown = np.flatnonzero((types < NORMAL) | (types > BYTE))
    if unknown.size:
        i = int(unknown[0])
        raise BadModelFile(f"{where}: {PREFIX}token_type {types[i]} of token {i}; there are types 1 to 6; {ELSEWHERE}")
    unscored = np.flatnonzero(~np.isfinite(scores))
    if unscored.size:
        i = int(unscored[0])
        raise BadModelFile(
            f"{where}: {PREFIX}scores has {scores[i]} for token {i}, which is not a finite number; {ELSEWHERE}"
        )
    end = len(tokens)
    while end and types[end - 1] == UNUSED and tokens[end - 1] == f"[PAD{end - 1}]":
        end -= 1  # rows of the embedding that have no piece
    tokens, scores, types = tokens[:end], scores[:end], types[:end].copy()
    pieces, own_scores, kinds = list(tokens), scores.copy(), types.copy()
    told = {symbol.id: symbol.text for symbol in _told(header, tokens)}
    names = set(pieces)
    # Before the bytes Gemma keeps what no merge makes.
    first_byte = pieces.index("<0x00>") if "<0x00>" in pieces else 0
    for i in np.flatnonzero((types != NORMAL) | (scores == 0) | (scores == ADDED)).tolist():
        if i in told and pieces[i] == unspelled(i):
            pieces[i], types[i] = told[i], USER_DEFINED
        kinds[i] = _kind(pieces[i], int(types[i]), i < first_byte)
        if kinds[i] == USER_DEFINED:
            spelling = pieces[i].replace(" ", SPACE)  # the converter writes the spaces of such pieces bare
            if spelling not in names:
                pieces[i] = spelling
                names.add(spelling)
        if kinds[i] not in (NORMAL, UNUSED):
            own_scores[i] = 0
    for i in end_ids(header):
        if i < end and _is_added_end(pieces, i, int(kinds[i])):
            kinds[i], own_scores[i] = CONTROL, 0  # as llama.cpp takes it, whatever the type says
    _check_declared(metadata, tokens, kinds, where)
    merges = np.flatnonzero(kinds == NORMAL)
    if merges.size and merges[0] < first_byte:
        i = int(merges[0])
        raise BadModelFile(
            f"{where}: token {i} ({pieces[i]!r:.80}) stands before the byte tokens, where Gemma keeps what no merge "
            f"makes, but has the score {scores[i]:g} of a merge; {ELSEWHERE}"
        )
    if merges.size > 1 and (own_scores[merges] == own_scores[merges[0]]).all():
        raise BadModelFile(
            f"{where}: all merged tokens have the score {own_scores[merges[0]]:g}, so the order of merges is lost; "
            f"{ELSEWHERE}"
        )
    return Vocabulary(pieces, own_scores, kinds, _flag(header, "add_space_prefix", True))


def _kind(piece: str, stated: int, below_bytes: bool) -> int:
    """The kind of a piece in Gemma's SentencePiece model, where it is not a merge.

    What a file calls CONTROL and Gemma does not have stays CONTROL, so that no text is read as one.
    """
    if piece in SPECIAL:
        return SPECIAL[piece]
    if BYTE_PIECE.fullmatch(piece):
        return BYTE
    if SYMBOL.fullmatch(piece) or (stated == NORMAL and below_bytes):
        return USER_DEFINED
    return stated


def _check_declared(metadata: Mapping[str, Value], pieces: list[str], kinds: NDArray[np.integer], where: str) -> None:
    """Every id that the file states is the piece that Gemma 2 uses for it, or one that a fine-tune may use for it."""
    for name in (*DECLARED, "eom"):
        key = f"{PREFIX}{name}_token_id"
        if key not in metadata:
            continue
        stated = metadata[key]
        token = stated.value
        if stated.type != "u32" or token >= len(pieces):
            raise BadModelFile(f"{where}: {key} is {stated}, and must be a u32 below {len(pieces)}; {ELSEWHERE}")
        piece = DECLARED.get(name, DECLARED["eot"])
        # Chat models made by others end with pieces of their own, and state the end of a turn as that of everything.
        free = name in ENDS and may_end(pieces[token], int(kinds[token]))
        if pieces[token] != piece and not free:
            raise BadModelFile(
                f"{where}: {key} is {token}, which is {pieces[token]!r:.80} and not {piece}; {ELSEWHERE}"
            )


def may_end(piece: str, kind: int) -> bool:
    """Whether a text may end at a piece: a control piece, or one that is a symbol, but no white space and no tag."""
    if piece in SPECIAL:
        return piece == DECLARED["eos"]
    own = SYMBOL.fullmatch(piece) is not None and STEERING.fullmatch(piece) is None
    return kind == CONTROL or (kind == USER_DEFINED and not own)


def _is_added_end(pieces: list[str], i: int, kind: int) -> bool:
    """Whether a piece at which a text ends is of type NORMAL, though no merge makes it."""
    if kind != NORMAL or pieces[i] in SPECIAL:
        return False
    known, piece = set(pieces), pieces[i]
    return len(piece) > 1 and not any(piece[:n] in known and piece[n:] in known for n in range(1, len(piece)))


def _array(metadata: Mapping[str, Value], name: str, kind: str, where: str) -> Any:
    key = PREFIX + name
    if key not in metadata:
        raise BadModelFile(f"{where}: {key} is missing, so its tokenizer cannot be rebuilt; {ELSEWHERE}")
    if metadata[key].type != kind:
        raise BadModelFile(f"{where}: {key} is of type {metadata[key].type}, and must be {kind}; {ELSEWHERE}")
    return metadata[key].value


def _flag(header: GGUF, name: str, absent: bool) -> bool:
    stated = header.metadata.get(PREFIX + name)
    if stated is None:
        return absent
    if stated.type != "bool":
        raise BadModelFile(f"{header.path}: {PREFIX}{name} is of type {stated.type}, and must be bool; {ELSEWHERE}")
    return bool(stated.value)
