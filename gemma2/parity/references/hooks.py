"""Seeing what flows through another system's PyTorch modules, without a change to its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gemma2.config import Gemma2Config
from gemma2.research.sites import LAYER, sites

INPUT, OUTPUT = "input", "output"
Places = Mapping[str, tuple[str, str]]  # site -> a module, and which of its sides is the site
# transformers and gemma_pytorch call these modules the same. What a module reads is the residual stream there.
COMMON: Places = {
    "blocks.{i}.hook_resid_pre": ("model.layers.{i}", INPUT),
    "blocks.{i}.ln1": ("model.layers.{i}.input_layernorm", OUTPUT),
    "blocks.{i}.attn.hook_z": ("model.layers.{i}.self_attn.o_proj", INPUT),
    "blocks.{i}.hook_attn_out": ("model.layers.{i}.post_attention_layernorm", OUTPUT),
    "blocks.{i}.hook_resid_mid": ("model.layers.{i}.pre_feedforward_layernorm", INPUT),
    "blocks.{i}.ln2": ("model.layers.{i}.pre_feedforward_layernorm", OUTPUT),
    "blocks.{i}.mlp.hook_pre": ("model.layers.{i}.mlp.gate_proj", OUTPUT),
    "blocks.{i}.mlp.hook_pre_linear": ("model.layers.{i}.mlp.up_proj", OUTPUT),
    "blocks.{i}.mlp.hook_post": ("model.layers.{i}.mlp.down_proj", INPUT),
    "blocks.{i}.hook_mlp_out": ("model.layers.{i}.post_feedforward_layernorm", OUTPUT),
    "blocks.{i}.hook_resid_post": ("model.layers.{i}", OUTPUT),
    "ln_final": ("model.norm", OUTPUT),
}


def in_layers(names: Mapping[str, tuple[str, str]], count: int) -> dict[str, tuple[str, str]]:
    """Places with {i} in their names, once for every layer."""
    found: dict[str, tuple[str, str]] = {}
    for site, (module, side) in names.items():
        for layer in range(count if LAYER in site else 1):
            found[site.replace(LAYER, str(layer))] = (module.replace(LAYER, str(layer)), side)
    return found


@contextmanager
def watching(model: nn.Module, places: Places, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(site, value)` for every place of every pass inside the block."""
    with ExitStack() as hooks:
        for site, (module, side) in places.items():
            hook = _teller(see, site, side)
            handle = model.get_submodule(module).register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _teller(see: Callable[[str, Tensor], None], site: str, side: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        read = args[0] if args else named["hidden_states"]
        see(site, read if side == INPUT else output[0] if isinstance(output, tuple) else output)

    return hook


def as_site(name: str, value: Tensor, config: Gemma2Config) -> Tensor:
    """A value of one row, [1 t ...] or for scores [1 h t s], in the site's own shape without the batch axis; a copy on
    the CPU, since another implementation may overwrite what it computed."""
    site = sites(config)[name]
    t = value.shape[-2] if "s" in site.shape.split() else value.shape[1]
    return value.detach().reshape(site.sizes(config, t)[1:]).to("cpu", copy=True)
