"""Taking the architecture apart: caps, windows, norms, layers and heads, changed for the length of a `with` block."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.checks import BEYOND, SMALLEST, check_count, check_number
from gemma2.config import GLOBAL, LOCAL, Gemma2Config
from gemma2.model import Block, Gemma2, RMSNorm, SoftCap, Tap
from gemma2.research.watch import check_shown, model_of
from gemma2.twins import replaced


class Leave(Enum):
    """The value of a switch that is not touched; None means something else: to take the cap or the window away."""

    LEAVE = "as it is"

    def __repr__(self) -> str:
        return "LEAVE"


LEAVE = Leave.LEAVE
Cap = float | Leave | None
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


@contextmanager
def ablate(
    model: Any,
    *,
    attn_softcap: Cap = LEAVE,
    final_softcap: Cap = LEAVE,
    window: int | Leave | None = LEAVE,
    layer_types: Sequence[str] | None = None,
    post_norms: bool = True,
    embed_scale: bool = True,
    heads: Iterable[tuple[int, int]] = (),
    layers: Iterable[int] = (),
) -> Iterator[Gemma2Config]:
    """Change the architecture of a model for the length of the block. Afterwards it is as it was, bit for bit.

        with ablate(model, attn_softcap=None, window=64):
            model(tokens)

    It changes plain passes, scoring and generation, of packed and fast models too. Sites show what the changed model
    computes. Blocks can be nested: the inner one wins where both change the same thing.

    Inside the block, `model.config` is the config that is given by the `with`: with the changed window, layer types and
    caps (a cap that is taken away stays as it was there, since a config cannot say it). So caches that are made inside
    fit the changed layers. Such a cache belongs to the block: after it, the layers may need keys that it did not keep.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        attn_softcap: another cap on the scores of all layers; None takes it away. Without a cap, or with one above 64,
            the fast twin of attention computes as the plain one.
        final_softcap: the same for the logits.
        window: how many positions local layers see, the query's own included; None lets them see everything.
        layer_types: which layers are local: "sliding_attention" or "full_attention" for each layer.
        post_norms: False takes away the norms behind attention and MLP: their outputs are added as they are. The sites
            inside these norms are refused then.
        embed_scale: False leaves out the factor sqrt(d) behind the embedding.
        heads: (layer, head) pairs whose output `hook_z` becomes zero.
        layers: numbers of layers that are left out: the residual stream passes through unchanged. Such a layer still
            computes, so that caches stay in step; what it adds is dropped.
    Raises:
        ValueError: no switch, or a value that cannot be; a part that a twin hides; inside the block, a cache that was
            made for other layers and does not keep all keys that the changed ones see.
    """
    inner = model_of(model)
    config = ablated_config(inner.config, attn_softcap, final_softcap, window, layer_types)
    skipped, silent = _checked_layers(config, layers), _checked_heads(config, heads)
    for name, value in (("post_norms", post_norms), ("embed_scale", embed_scale)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")
    capped = {"self_attn.attend.softcap": attn_softcap, "softcap": final_softcap}
    changed = [cap for cap in capped.values() if not isinstance(cap, Leave)]
    plain = isinstance(window, Leave) and layer_types is None and post_norms and embed_scale
    if plain and not (changed or skipped or silent):
        raise ValueError("there is nothing to ablate: give a switch, as attn_softcap=None")
    with ExitStack() as stack:
        # Compiled code does not run hooks. It does see twins and numbers, but is compiled once more for each.
        if "torch._dynamo" in sys.modules and (skipped or _compiles(model)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for end, cap in capped.items():
            if not isinstance(cap, Leave):
                _replace(stack, inner, _ends(inner, end), partial(with_cap, cap=cap))
        if not post_norms:
            _replace(stack, inner, [path for end in POST_NORMS for path in _ends(inner, end)], NoNorm)
        if not embed_scale:
            _set(stack, _module(inner, "model.embed_tokens", "scale"), "scale", 1.0)
        for i, path in enumerate(_ends(inner, "self_attn.attend")):
            if config.window(i) != inner.config.window(i):
                attend = _module(inner, path, "window")
                _set_window(stack, attend, config.window(i))
                stack.callback(attend.register_forward_pre_hook(_check_keys(inner, i)).remove)
        check_shown(inner, [f"blocks.{layer}.attn.hook_z" for layer in silent])
        for layer, which in silent.items():
            _replace(stack, inner, [f"model.layers.{layer}.self_attn.attend.hook_z"], partial(Silent, heads=which))
        for layer in skipped:
            _skip(stack, inner, layer)
        for owner in (inner, inner.model):
            _set(stack, owner, "config", config)
        stack.callback(inner.model.register_forward_pre_hook(_check_cache(inner), with_kwargs=True).remove)
        yield config


class Stand(nn.Module):
    """A twin that shares everything of the plain part but what it computes: also hooks, those that are set meanwhile
    included. So a site shows the changed value, whichever was there first."""

    def __init__(self, plain: nn.Module) -> None:
        self.__dict__.update(plain.__dict__)
        self.__dict__.pop("forward", None)  # accelerate's, which calls the plain part's


class NoCap(Stand, SoftCap):
    """What takes a cap's place: nothing."""

    def __init__(self, plain: SoftCap) -> None:
        super().__init__(plain)
        self.plain: Callable[[], SoftCap] = lambda: plain  # not a module inside

    def forward(self, x: Tensor) -> Tensor:
        return x


class NoNorm(Stand):
    """What takes a norm's place: nothing. It keeps the norm's parameter; the taps inside are gone."""

    hides = ("hook_inv_scale", "hook_normalized")

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__(plain)
        self._modules = {}

    def forward(self, x: Tensor) -> Tensor:
        return x


class Silent(Stand, Tap):
    """A tap of head outputs [b t h c] behind which some heads are zero."""

    def __init__(self, plain: Tap, heads: list[int]) -> None:
        super().__init__(plain)
        self.heads = sorted({*heads, *getattr(plain, "heads", ())})

    def forward(self, z: Tensor) -> Tensor:
        return z.index_fill(2, torch.tensor(self.heads, device=z.device), 0.0)


def with_cap(plain: SoftCap, cap: float | None) -> SoftCap:
    """A twin of a cap, of its own kind, with another cap or none. It shares the hooks."""
    own = plain.plain() if isinstance(plain, NoCap) else plain
    if cap is None:
        return NoCap(own)
    twin = copy.copy(own)  # of its own class: implementations round a cap differently
    twin.__dict__.pop("forward", None)
    twin.cap = float(cap)
    return twin


def ablated_config(
    config: Gemma2Config, attn_softcap: Cap, final_softcap: Cap, window: int | Leave | None, types: Sequence[str] | None
) -> Gemma2Config:
    """The config with these switches, as far as a config can state them. Raises ValueError, see `ablate`."""
    changes: dict[str, Any] = {}
    given = {"attn_logit_softcapping": attn_softcap, "final_logit_softcapping": final_softcap}
    for field, cap in given.items():
        if cap is not None and not isinstance(cap, Leave):
            name = "attn_softcap" if field.startswith("attn") else "final_softcap"
            range_ = "above 0, or None, which takes the cap away,"
            changes[field] = float(check_number(name, cap, range_, lambda x: SMALLEST <= x < BEYOND))
    if types is not None:
        if isinstance(types, str) or len(tuple(types)) != config.num_hidden_layers:
            raise ValueError(f"layer_types must name {config.num_hidden_layers} layers, each {LOCAL!r} or {GLOBAL!r}")
        changes["layer_types"] = tuple(types)
    if window is None:
        if types is not None:
            raise ValueError("window=None makes every layer global, so layer_types would change nothing: give one")
        changes["layer_types"] = (GLOBAL,) * config.num_hidden_layers
    elif not isinstance(window, Leave):
        changes["sliding_window"] = check_count("window", window, least=1)
        if LOCAL not in (types or config.layer_types):
            raise ValueError("no layer is local, so a window changes nothing: give layer_types too")
    return replace(config, **changes)


def _checked_layers(config: Gemma2Config, layers: Iterable[int]) -> list[int]:
    found = [layers] if isinstance(layers, int) else list(layers)
    for layer in found:
        if type(layer) is not int or not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"layers: this model has layers 0 to {config.num_hidden_layers - 1}, not {layer!r}")
    return sorted(set(found))


def _checked_heads(config: Gemma2Config, heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Layer -> its heads."""
    found: dict[int, list[int]] = {}
    for pair in heads:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or any(type(one) is not int for one in pair):
            raise ValueError(f"heads are pairs (layer, head), as [(0, 3), (2, 1)], not {pair!r}")
        _checked_layers(config, [pair[0]])
        if not 0 <= pair[1] < config.num_attention_heads:
            raise ValueError(f"heads: this model has heads 0 to {config.num_attention_heads - 1}, not {pair[1]}")
        found.setdefault(pair[0], []).append(pair[1])
    return found


def _compiles(model: Any) -> bool:
    """Whether a model is compiled, as a whole or by the layer."""
    return hasattr(model, "_orig_mod") or any(type(layer) is not Block for layer in model_of(model).model.layers)


def _ends(model: Gemma2, end: str) -> list[str]:
    """The path itself, or that of the same part in each layer."""
    return [end] if end == "softcap" else [f"model.layers.{i}.{end}" for i in range(len(model.model.layers))]


def _module(model: Gemma2, path: str, attribute: str) -> nn.Module:
    """The module at a path. Raises ValueError where a twin does without it, or without that attribute."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if module is None or not hasattr(module, attribute):
        kind = "nothing" if module is None else type(module).__name__
        raise ValueError(f"{path} cannot be ablated: {kind} with a {attribute} is there; take the twin out first")
    return module


def _replace(stack: ExitStack, model: Gemma2, paths: list[str], twin: Callable[[Any], nn.Module]) -> None:
    for path in paths:
        _module(model, path, {"softcap": "cap", "hook_z": "forward"}.get(path.rpartition(".")[2], "weight"))
    stack.enter_context(replaced(model, lambda path, module: twin(module) if path in paths else None))


def _set(stack: ExitStack, owner: nn.Module, name: str, value: object) -> None:
    """Set an attribute until the stack ends."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _set_window(stack: ExitStack, attend: nn.Module, window: int | None) -> None:
    _set(stack, attend, "window", window)
    back = getattr(attend, "back", None)  # the fast twin's window, for compiled code
    if isinstance(back, Tensor):
        _set(stack, attend, "back", torch.full_like(back, 2**31 - 1 if window is None else window))


def _skip(stack: ExitStack, model: Gemma2, layer: int) -> None:
    """Let the residual stream pass a layer, with the edits that others made to it at `hook_resid_pre`."""
    block = model.get_submodule(f"model.layers.{layer}")
    entered: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered[:] = inputs[:1]

    def leave(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return entered.pop()

    first = _module(model, f"model.layers.{layer}.input_layernorm", "weight")
    stack.callback(entered.clear)
    stack.callback(first.register_forward_pre_hook(enter).remove)
    stack.callback(block.register_forward_hook(leave, prepend=True).remove)


def _check_keys(model: Gemma2, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """The same for a cache that does not say how many keys it keeps, as transformers' do: by how many columns it gives
    to the first query of a pass."""

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        positions, keys = inputs[3:5]
        (_, t), columns = positions.shape, keys.shape[1]
        if torch.compiler.is_compiling() or columns == t:  # none are from a cache
            return
        needed = int(positions[:, 0].max()) + 1
        needed = min(needed, model.config.window(layer) or needed)
        if columns - t + 1 < needed:
            raise ValueError(
                f"layer {layer} sees {needed} positions in this block and the cache has kept {columns - t + 1}: give "
                "one that keeps all keys, as transformers' DynamicCache() without a config"
            )

    return check


def _check_cache(model: Gemma2) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """Refuse a cache whose rings are shorter than what the layers see: it would forget keys, and nothing would say so.
    The config is read at each pass: another block inside may have changed it once more."""

    def check(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        cache = options.get("cache", args[2] if len(args) > 2 else None)
        if cache is None:
            return
        for layer, store in enumerate(cache.layers):
            slots = getattr(store, "slots", None)
            if slots is None:  # a store of someone's own that does not say
                continue
            kept = min(slots, getattr(store, "window", slots))
            needed = min(model.config.window(layer) or cache.capacity, cache.capacity)
            if kept < needed:
                raise ValueError(
                    f"layer {layer} sees {needed} positions in this block and the cache keeps {kept}: make the cache "
                    "inside the block, as HybridCache(model.config, ...), or from the config that `ablate` gives"
                )

    return check
