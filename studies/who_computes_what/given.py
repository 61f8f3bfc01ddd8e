"""What recipes are given and give back. Run by an implementation's own Python, with torch and safetensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Values = dict[str, Tensor]
# A block's two contributions and its end, in Hugging Face's names for the modules.
HUGGING_FACE = {
    "blocks.{i}.hook_attn_out": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.hook_mlp_out": "model.layers.{i}.post_feedforward_layernorm",
    "blocks.{i}.hook_resid_post": "model.layers.{i}",
    "ln_final": "model.norm",
}


@dataclass(frozen=True)
class Built:
    """Another implementation, built by its own code, with its weights.

    Attributes:
        system: who it is, with its version.
        run: tokens [1 t] in one pass -> site -> value, with the batch axis.
        cached: tokens [1 t] in chunks of these lengths, with the implementation's own cache -> logits [1 t v].
    """

    system: str
    run: Callable[[Tensor], Values]
    cached: Callable[[Tensor, list[int]], Tensor] | None


@dataclass(frozen=True)
class Given:
    """What every recipe is given."""

    folder: Path
    config: Mapping[str, Any]
    dtype: torch.dtype
    longest: int  # ids in any run

    def weights(self) -> Values:
        return {name: value.to(self.dtype) for name, value in load_file(self.folder / "model.safetensors").items()}

    def layers(self) -> range:
        return range(self.config["num_hidden_layers"])


def watched(model: nn.Module, places: Mapping[str, str], layers: Iterable[int], run: Callable[[], Tensor]) -> Values:
    """The outputs of modules during `run`, which gives the logits. `places`: site -> module, with {i} for the layer."""
    seen: Values = {}

    def hook(site: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[site] = output[0] if isinstance(output, tuple) else output

        return see

    for site, path in places.items():
        for i in layers if "{i}" in site else [0]:
            module = model.get_submodule(path.replace("{i}", str(i)))
            module.register_forward_hook(hook(site.replace("{i}", str(i))))
    seen["logits"] = run()
    for module in model.modules():
        module._forward_hooks.clear()
    return seen


def spans(chunks: Iterable[int]) -> Iterable[tuple[int, int]]:
    start = 0
    for length in chunks:
        yield start, start + length
        start += length
