"""Gemma 2 in a GGUF file as llama.cpp writes and reads it: its names, its numbers, and what it leaves out.

No GGUF states everything. What is missing is decided as llama.cpp decides it (src/models/gemma2.cpp, load_arch_hparams)
and said in the notes of `config_of`; anything else that is missing is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gemma2.checkpoints.ggml import Scales, dequantize_into, scales
from gemma2.checkpoints.gguf import FLOAT, GGUF, INTEGER, TensorInfo, Value
from gemma2.checks import MOST_LAYERS
from gemma2.config import GLOBAL, LOCAL, Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.tied import EMBEDDING, HEAD

ARCHITECTURE = "gemma2"
MODEL = Value("str", "model")
# llama.cpp's name -> Hugging Face's, without the layer.
OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
REDUNDANT = ("rope_freqs.weight",)  # the rotary table, computed from the config
ROWS = 4096  # read at once where only a little of each is kept
NORM = "norm.weight"  # how the name of every norm weight ends, here and in Hugging Face's layers
# Beside a norm tensor, which holds 1 + w in float32, this project writes w itself where the sum has lost bits of it.
ZERO_CENTRED = "gemma2.norm_weight."
# Config field -> key after "gemma2.", for what a file must state.
INTEGERS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
EPSILON = "attention.layer_norm_rms_epsilon"
PATTERN = "attention.sliding_window_pattern"
# Config field -> key after "gemma2.", for what a file may leave out.
OTHERS = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rms_norm_eps": EPSILON,
    "rope_theta": "rope.freq_base",
}
LAYERS_27B = 46  # llama.cpp knows the 27B by its depth, and scales its queries by the width of a head in the stream


def hugging_face_name(name: str) -> str | None:
    """Hugging Face's name for one of llama.cpp's tensor names, or None for a name that Gemma 2 does not have."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, layer, *rest = (*name.split(".", 2), "", "")[:3]
    part = INSIDE.get(rest[0].removesuffix(".weight")) if rest[0].endswith(".weight") else None
    if block != "blk" or not layer.isdecimal() or str(int(layer)) != layer or part is None:
        return None
    return f"model.layers.{layer}.{part}.weight"


def llama_cpp_name(name: str) -> str:
    """llama.cpp's tensor name for a Gemma 2's parameter, which `name` is, in Hugging Face's spelling."""
    outside = {own: theirs for theirs, own in OUTSIDE.items()}
    if name in outside:
        return outside[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{ {own: theirs for theirs, own in INSIDE.items()}[part] }.weight"


def query_scale(layers: int, width: int, heads: int, head_width: int) -> int:
    """query_pre_attn_scalar, for which GGUF has no key, as llama.cpp takes it from the depth."""
    return width // heads if layers == LAYERS_27B else head_width


def check_architecture(header: GGUF) -> None:
    """Raises BadModelFile, saying what the file is, unless it is a Gemma 2 model."""
    stated = header.metadata.get("general.architecture")
    if stated is None:
        raise BadModelFile(f"{header.path}: general.architecture is missing, so this is not a model file")
    if stated != Value("str", ARCHITECTURE):
        shown = repr(stated.value)[:80] if stated.type == "str" else stated
        raise BadModelFile(f"{header.path}: architecture {shown}, this program runs {ARCHITECTURE!r}")
    stated = header.metadata.get("general.type", MODEL)
    if stated != MODEL:
        raise BadModelFile(f"{header.path}: general.type is {stated}, not a model with weights of its own")


def config_of(header: GGUF) -> tuple[Gemma2Config, list[str]]:
    """The architecture that a GGUF states, and a line for each value that it leaves out and llama.cpp fills in.

    Raises:
        BadModelFile: another architecture; a key that is missing, of another type, or against the others.
    """
    check_architecture(header)
    keys = _Keys(header)
    notes: list[str] = []

    def stated_or(key: str, kind: Literal["integer", "float"], otherwise: Any, why: str) -> Any:
        if keys.has(key):
            return keys.read(key, kind)
        notes.append(f"{ARCHITECTURE}.{key} is not stated: {otherwise:g}, {why}")
        return otherwise

    missing = [f"{ARCHITECTURE}.{key}" for key in (*INTEGERS.values(), EPSILON) if not keys.has(key)]
    if missing:
        raise BadModelFile(f"{header.path}: missing {', '.join(missing)}; a shape is never guessed")
    values: dict[str, Any] = {field: keys.read(key, "integer") for field, key in INTEGERS.items()}
    layers, heads, width = values["num_hidden_layers"], values["num_attention_heads"], values["hidden_size"]
    for key, found, most in (("block_count", layers, MOST_LAYERS), ("attention.head_count", heads, 2**31 - 1)):
        if not 1 <= found <= most:
            raise BadModelFile(f"{header.path}: {ARCHITECTURE}.{key} is {found}; 1 to {most:,} are taken")
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.has(key) and keys.read(key, "integer") != values["head_dim"]:
            raise BadModelFile(
                f"{header.path}: {ARCHITECTURE}.{key} is {keys.read(key, 'integer')}, but Gemma 2's heads have one "
                f"width, {ARCHITECTURE}.attention.key_length {values['head_dim']}"
            )
    _refuse_scaled_rotary(header, keys)
    values["rms_norm_eps"] = keys.read(EPSILON, "float")
    values["rope_theta"] = stated_or("rope.freq_base", "float", 10000.0, "as in every Gemma 2 (no converter writes it)")
    values["sliding_window"] = stated_or("attention.sliding_window", "integer", 4096, "as llama.cpp takes it")
    values["attn_logit_softcapping"] = stated_or("attn_logit_softcapping", "float", 50.0, "as llama.cpp takes it")
    values["final_logit_softcapping"] = stated_or("final_logit_softcapping", "float", 30.0, "as llama.cpp takes it")
    values["layer_types"] = _layer_types(keys, layers, notes)
    values["query_pre_attn_scalar"] = query_scale(layers, width, heads, values["head_dim"])
    rule = (
        f"{width} // {heads}, the width by the heads, as llama.cpp scales a model of {LAYERS_27B} layers (27B)"
        if layers == LAYERS_27B
        else f"the width of a head, as llama.cpp scales every model but that of {LAYERS_27B} layers (27B)"
    )
    notes.append(f"no key states the query scale: {values['query_pre_attn_scalar']} ** -0.5, {rule}")
    if keys.has("attention.scale"):
        notes.append(
            f"{ARCHITECTURE}.attention.scale {keys.read('attention.scale', 'float'):g} is ignored, as by llama.cpp"
        )
    values["vocab_size"] = _vocabulary(header, keys)
    try:
        return Gemma2Config(**values), notes
    except ValueError as error:
        said = str(error)
        for field, key in (INTEGERS | OTHERS).items():
            said = re.sub(rf"(?<![.\w]){field}\b", f"{ARCHITECTURE}.{key}", said)
        raise BadModelFile(f"{header.path}: {said}") from None


class GGUFWeights:
    """A `Weights` over one GGUF file or all parts of a split one. Blocks are read a few rows at a time, by every thread
    that asks, and dequantised where the rows are wanted: on the processor or, raw bytes first, on an accelerator.

    A norm tensor holds g = 1 + w: `raw` gives g, and `read` gives w. See `dtype_for` for how the model's 1 + w is g to
    the bit.
    """

    def __init__(self, header: GGUF) -> None:
        self.where, self._header = str(header.path), header
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._info: dict[str, TensorInfo] = {}
        unknown = []
        for name, info in header.tensors.items():
            own = hugging_face_name(name)
            if name in REDUNDANT:
                continue
            if own is None:
                unknown.append(name)
                continue
            self._info[own] = info
            self.tensors[own] = (info.shape, torch.float32)
        if unknown:
            listed = ", ".join(repr(name) for name in unknown[:5])
            raise BadModelFile(f"{self.where}: {len(unknown)} tensors that no Gemma 2 has: {listed}")

    @property
    def dtype(self) -> torch.dtype:
        """float32 for a file whose matrices are all F32; for any other bfloat16, in which Gemma 2 was published."""
        return torch.float32 if self.types == {"F32"} else torch.bfloat16

    @property
    def types(self) -> set[str]:
        """The ggml types of its matrices."""
        return {info.type.name for info in self._info.values() if len(info.shape) > 1}

    @property
    def files(self) -> set[Path]:
        """The files that hold tensors: one, or the parts of a split one."""
        return {info.path for info in self._info.values()}

    def dtype_for(self, name: str, wanted: torch.dtype) -> torch.dtype:
        """For a norm the narrowest dtype, from `wanted` up, in which 1 + w is exactly the file's g; else `wanted`.

        A g made by adding 1 to a float32 w is always had from float32; bfloat16 is enough for Google's own weights.
        Any other g needs float64, which is exact to 2^-54.
        """
        if not name.endswith(NORM):
            return wanted
        g = self._whole(name)
        if not g.isfinite().all():
            return wanted  # refused, or let through on purpose
        w = self._zero_centred(name, g)
        widths = dict.fromkeys((wanted, torch.promote_types(wanted, torch.float32), torch.float64))
        for dtype in widths:
            wide = w.to(dtype).to(torch.promote_types(dtype, torch.float32))
            if torch.equal(1.0 + wide, g.to(wide.dtype)):
                return dtype
        return torch.float64

    def in_file(self, name: str) -> str:
        return llama_cpp_name(name)

    def read(self, name: str, start: int, out: Tensor) -> None:
        if name.endswith(NORM):
            w = self._zero_centred(name, self._whole(name))
            out.copy_(w[start : start + len(out)])
            return
        self._dequantize(name, start, out)

    def stored(self, name: str) -> str:
        return self._info[name].type.name

    def raw(self, name: str, start: int, stop: int) -> Tensor:
        info = self._info[name]
        start, rows = (0, 1) if len(info.shape) == 1 else (start, stop - start)
        raw = torch.empty(rows, info.row_bytes, dtype=torch.uint8, device="cpu")
        # Read rather than mapped: a file that another program cuts short is an error then, not the end of the process.
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.offset + start * info.row_bytes)
            if file.readinto(raw.numpy().data) != raw.nbytes:
                raise BadModelFile(f"{info.path}: ended while it was read: it has become shorter")
        return raw

    def release(self) -> None:
        """Nothing is mapped."""

    def scales(self, name: str) -> Scales | None:
        """What the integers of a whole tensor are multiplied with; None where `ggml.scales` has none."""
        info = self._info[name]
        pieces = []
        for start in range(0, info.shape[0], ROWS):
            found = scales(self.raw(name, start, min(start + ROWS, info.shape[0])), info.type)
            if found is None:
                return None
            pieces.append(found)
        joined = (None if part[0] is None else torch.cat(part) for part in zip(*pieces, strict=True))
        return Scales(*joined)  # type: ignore[arg-type]

    def _whole(self, name: str) -> Tensor:
        """A whole small tensor with the values that the file has, in float32."""
        g = torch.empty(self._info[name].shape, dtype=torch.float32, device="cpu")
        self._dequantize(name, 0, g)
        return g

    def _zero_centred(self, name: str, g: Tensor) -> Tensor:
        """The norm weight w of a gain g = 1 + w, in float64, in which the subtraction loses nothing of a float32 g."""
        given = self._header.metadata.get(ZERO_CENTRED + llama_cpp_name(name))
        if given is None:
            return g.double() - 1.0
        if given.type != "f32[]" or len(given.value) != len(g):
            raise BadModelFile(f"{self.where}: {ZERO_CENTRED}{llama_cpp_name(name)} must be an f32[] of {len(g)}")
        w = torch.from_numpy(given.value.copy())
        if not torch.equal(1.0 + w, g):
            raise BadModelFile(
                f"{self.where}: {ZERO_CENTRED}{llama_cpp_name(name)} plus 1 is not tensor {llama_cpp_name(name)}"
            )
        return w.double()

    def _dequantize(self, name: str, start: int, out: Tensor) -> None:
        raw = self.raw(name, start, start + len(out))
        dequantize_into(raw.to(out.device), self._info[name].type, out.view(len(raw), -1))


class _Keys:
    """Typed access to the keys of the architecture."""

    def __init__(self, header: GGUF) -> None:
        self.path, self.metadata = header.path, header.metadata

    def has(self, key: str) -> bool:
        return f"{ARCHITECTURE}.{key}" in self.metadata

    def raw(self, key: str) -> Value:
        return self.metadata[f"{ARCHITECTURE}.{key}"]

    def read(self, key: str, kind: Literal["integer", "float"]) -> Any:
        found = self.raw(key)
        if found.type not in (INTEGER if kind == "integer" else FLOAT):
            article = "an integer" if kind == "integer" else "a float"
            raise BadModelFile(f"{self.path}: {ARCHITECTURE}.{key} is {found}, and must be {article}")
        # The shortest decimal that is this float32: 1e-06 rather than 9.99999997e-07, as config.json has it.
        return float(str(np.float32(found.value))) if found.type == "f32" else found.value


def _layer_types(keys: _Keys, layers: int, notes: list[str]) -> tuple[str, ...]:
    key = PATTERN
    if not keys.has(key):
        notes.append(f"{ARCHITECTURE}.{key} is not stated: 2, as llama.cpp takes it (layer 0 is local, layer 1 global)")
        pattern = 2
    elif keys.raw(key).type == "bool[]":
        local = keys.raw(key).value.tolist()
        if len(local) != layers:
            raise BadModelFile(f"{keys.path}: {ARCHITECTURE}.{key} has {len(local)} entries for {layers} layers")
        return tuple(LOCAL if is_local else GLOBAL for is_local in local)
    else:
        pattern = keys.read(key, "integer")
        if pattern < 0:
            raise BadModelFile(f"{keys.path}: {ARCHITECTURE}.{key} is {pattern}, and cannot be negative")
    # llama.cpp, set_swa_pattern: the last of every `pattern` layers is global; 0 makes all local.
    return tuple(LOCAL if pattern == 0 or i % pattern < pattern - 1 else GLOBAL for i in range(layers))


def _refuse_scaled_rotary(header: GGUF, keys: _Keys) -> None:
    scaling = "rope.scaling.type"
    if keys.has(scaling) and keys.raw(scaling) != Value("str", "none"):
        stated = f"{ARCHITECTURE}.{scaling} is {keys.raw(scaling)}"
        raise BadModelFile(f"{header.path}: {stated}; Gemma 2's rotary embedding is plain")
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if keys.has(key) and keys.read(key, "float") not in (0.0, 1.0):
            raise BadModelFile(f"{header.path}: {ARCHITECTURE}.{key} is {keys.raw(key)}; Gemma 2 has none")


def _vocabulary(header: GGUF, keys: _Keys) -> int:
    """Rows of the embedding; in a file with a tokenizer alone, its pieces."""
    embedding = header.tensors.get("token_embd.weight")
    pieces = header.metadata.get("tokenizer.ggml.tokens")
    if embedding is not None:
        rows = embedding.shape[0]
    elif pieces is not None and pieces.type == "str[]":
        rows = len(pieces.value)
    else:
        raise BadModelFile(f"{header.path}: neither token_embd.weight nor a tokenizer, so no vocabulary")
    if keys.has("vocab_size") and keys.read("vocab_size", "integer") != rows:
        stated = keys.read("vocab_size", "integer")
        raise BadModelFile(f"{header.path}: {ARCHITECTURE}.vocab_size is {stated}, the embedding has {rows} rows")
    return rows
