"""Numbers that must be what they are for: counts, settings and a model's shape. Each check raises ValueError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLOATS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps", "rope_theta")
SMALLEST, BEYOND = 2.0**-126, 2.0**128  # the normal numbers of float32
# Far above any Gemma 2: a config beyond them is a mistake, or made to exhaust memory before weights are looked at.
MOST_LAYERS, MOST_PARAMETERS = 1024, 10**13


def plain_number(value: object) -> Any:
    """A number of numpy or PyTorch, which may be an array without dimensions, as Python's; anything else as it is."""
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        try:
            return item()
        except RuntimeError:  # on the meta device, say
            pass
    return value


def check_count(name: str, value: object, least: int = 0) -> int:
    """The integer (no bool) from `least` to 2^63 - 1. Raises ValueError for anything else."""
    number = plain_number(value)
    if type(number) is not int or not least <= number < 2**63:
        kind = {0: "a non-negative integer", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    return number


def check_number(name: str, value: object, range_: str, holds: Callable[[float], bool]) -> float:
    """The real number (no bool) for which `holds` is true. Raises ValueError for anything else."""
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not holds(number):
        raise ValueError(f"{name} must be a number {range_}, not {value!r}")
    return number


def check_config(config: Any, layer_types: tuple[str, ...]) -> None:
    """Raises ValueError for a `Gemma2Config` with numbers that no Gemma 2 can have, naming the field."""
    for name, value in vars(config).items():
        if name in FLOATS:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and SMALLEST <= value < BEYOND):
                raise ValueError(f"{name} must be a positive finite float32, not {value!r}")
        elif name != "layer_types" and not (type(value) is int and 1 <= value < 2**31):  # positions are int32
            raise ValueError(f"{name} must be a positive integer below 2^31, not {value!r}")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(f"num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary pairs, not {config.head_dim}")
    if config.rms_norm_eps > 0.1:
        raise ValueError(f"rms_norm_eps must be at most 0.1, not {config.rms_norm_eps!r}")
    layers, types = config.num_hidden_layers, config.layer_types
    if layers > MOST_LAYERS or config.parameter_count > MOST_PARAMETERS:
        raise ValueError(
            f"{layers:,} layers of {config.parameter_count:,} parameters are too many: "
            f"at most {MOST_LAYERS:,} and {MOST_PARAMETERS:,} are taken"
        )
    if not isinstance(types, tuple) or len(types) != layers or not all(kind in layer_types for kind in types):
        named = " or ".join(map(repr, layer_types))
        raise ValueError(f"layer_types must name {layers} layers, each {named}")
