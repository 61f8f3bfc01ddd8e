"""The small random models that every implementation is built with, and the runs that it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gemma2 import Gemma2
from gemma2.checkpoints.hf_config import read_config
from gemma2.convert import convert
from gemma2.load import POCKET

# Name -> how many ids, and the chunks in which they are fed to a cache (none: one pass without). The window is 16.
RUNS: dict[str, tuple[int, tuple[int, ...]]] = {
    "12": (12, ()),
    "64": (64, ()),
    "12, prefill 6": (12, (6, *[1] * 6)),
    "64, prefill 32": (64, (32, *[1] * 32)),
    "64, prefill 8": (64, (8, *[1] * 56)),
}
CAPACITY = max(length for length, _ in RUNS.values())  # of a cache whose size must be given
TINY: dict[str, Any] = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "hidden_size": 288,
    "intermediate_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 36,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# A GGUF states no query scale: it is the width of a head, and hidden size / heads (here 18) where there are 46 layers.
MODELS: dict[str, dict[str, Any]] = {
    "4 layers": TINY,
    "4 layers, query scale 16": TINY | {"query_pre_attn_scalar": 16},
    "46 layers": TINY
    | {"num_hidden_layers": 46, "hidden_size": 144, "intermediate_size": 576, "query_pre_attn_scalar": 18},
}


def random_model(raw: Mapping[str, Any], seed: int = 0) -> Gemma2:
    """Weights large enough that both caps saturate and norms matter."""
    model = Gemma2(read_config(dict(raw))).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gain = 4 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3
        std = 0.3 if "norm" in name else 1.0 if "embed" in name else gain * parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.requires_grad_(False)


def write_model(folder: Path, raw: Mapping[str, Any], gguf: bool) -> Gemma2:
    """What `run_one.py` reads."""
    folder.mkdir()
    model = random_model(raw)
    (folder / "config.json").write_text(json.dumps(dict(raw)), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(raw["vocab_size"], (CAPACITY,), generator=torch.Generator().manual_seed(1)).tolist()
    runs = {name: {"ids": ids[:length], "chunks": chunks} for name, (length, chunks) in RUNS.items()}
    (folder / "ids.json").write_text(json.dumps(runs), encoding="utf-8")
    if gguf:
        convert(folder, folder / "model.gguf", type="F32", progress=False)
    return model
