"""A small random Gemma 2 from a seed: the same weights on every machine, with every version of every library.

Each weight is a sum of four bytes of SHAKE-256 over the seed and the tensor's name, less its mean, times a factor: a
whole number and one rounding of a product. No library's random generator takes part, so a file that was made of these
weights years ago can be judged without storing them.

What the model must show, and why its numbers are as they are: K-quants need rows of 256 numbers, so the width and the
width of all heads are multiples of that, and unequal; the window is a fifth of the prompt; both caps saturate; and the
query scale is not the head width. A GGUF cannot state that scale, so the model made for llama.cpp has the head width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma2.checkpoints.hf_config import read_config
from gemma2.checkpoints.sentencepiece_proto import read_proto, write_proto
from gemma2.checkpoints.weights import shapes_of
from gemma2.load import POCKET

SEED = 10
LENGTH = 43  # of the prompt: five windows, and no multiple of what any kernel takes at a time
RAW: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 96,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def raw_config(gguf: bool = False) -> dict[str, Any]:
    """config.json's content; for a GGUF with the one query scale that such a file can state."""
    return {**RAW, "query_pre_attn_scalar": RAW["head_dim"]} if gguf else dict(RAW)


def _numbers(name: str, count: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[count size] bytes that the seed and a name determine."""
    stream = hashlib.shake_256(f"{SEED} {name}".encode()).digest(count * size)
    return np.frombuffer(stream, np.uint8).reshape(count, size)


def weights() -> dict[str, Tensor]:
    """Every parameter by name, float32."""
    found = {}
    for name, shape in shapes_of(read_config(RAW)).items():
        gain = 6 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3
        std = 0.3 if "norm" in name else 0.5 if "embed" in name else gain * shape[-1] ** -0.5
        whole = _numbers(name, int(np.prod(shape)), 4).astype(np.int32).sum(1) - 510
        factor = np.float32(std / (4 * (256**2 - 1) / 12) ** 0.5)
        found[name] = torch.from_numpy(whole.astype(np.float32) * factor).view(shape)
    return found


def ids() -> list[int]:
    """The prompt: <bos>, then any of the vocabulary."""
    drawn = _numbers("ids", LENGTH - 1, 2).astype(int)
    return [2, *((256 * drawn[:, 0] + drawn[:, 1]) % RAW["vocab_size"]).tolist()]


def tokenizer_model() -> bytes:
    """The first pieces of the pocket model's tokenizer."""
    whole, size = (
        read_proto((POCKET / "tokenizer.model").read_bytes(), "the pocket model's tokenizer"),
        RAW["vocab_size"],
    )
    return write_proto(replace(whole, pieces=whole.pieces[:size], scores=whole.scores[:size], kinds=whole.kinds[:size]))


def write_folder(place: Path, gguf: bool = False) -> Path:
    """The model in Hugging Face's format, at a place that is there."""
    (place / "config.json").write_text(json.dumps(raw_config(gguf), indent=2) + "\n", encoding="utf-8")
    (place / "tokenizer.model").write_bytes(tokenizer_model())
    save_file(weights(), place / "model.safetensors", metadata={"format": "pt"})
    return place
