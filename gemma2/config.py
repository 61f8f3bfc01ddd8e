"""Gemma 2's architecture as numbers. Nothing here says anything about the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # the values of Hugging Face's `layer_types`


@dataclass(frozen=True)
class Gemma2Config:
    """The shape of one Gemma 2. Field names are those of Hugging Face's `config.json`; none has a default.

    Raises:
        ValueError: a value has the wrong type or range, or two values contradict each other.
    """

    vocab_size: int  # v
    hidden_size: int  # d, the width of the residual stream
    intermediate_size: int  # f
    num_hidden_layers: int
    num_attention_heads: int  # h
    num_key_value_heads: int  # g
    head_dim: int  # c; h * c need not equal d (2B: 2048 against 2304)
    query_pre_attn_scalar: float  # scores are scaled by this ** -0.5; 27B: 144 (d / h), not head_dim
    sliding_window: int  # positions a local layer sees, the query's own included
    max_position_embeddings: int  # the context the model was trained for
    attn_logit_softcapping: float
    final_logit_softcapping: float
    rms_norm_eps: float
    rope_theta: float
    layer_types: tuple[str, ...]

    def __post_init__(self) -> None:
        check_numbers(self)

    def window(self, layer: int) -> int | None:
        """Positions that `layer` sees (its own included), or None where it sees everything before it."""
        return self.sliding_window if self.layer_types[layer] == LOCAL else None

    @property
    def parameter_count(self) -> int:
        """Parameters, the tied embedding counted once."""
        d, c = self.hidden_size, self.head_dim
        attention = 2 * d * c * (self.num_attention_heads + self.num_key_value_heads)  # q and o; k and v
        layer = attention + 3 * d * self.intermediate_size + 4 * d  # gate, up and down; four norms
        return self.vocab_size * d + self.num_hidden_layers * layer + d


FLOATS = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rms_norm_eps",
    "rope_theta",
)
SMALLEST, BEYOND = 2.0**-126, 2.0**128  # the normal numbers of float32
# Far above any Gemma 2: a config beyond them is a mistake, or made to exhaust memory before weights are looked at.
MOST_LAYERS, MOST_PARAMETERS = 1024, 10**13


def check_numbers(config: Gemma2Config) -> None:
    """Raises ValueError for numbers that no Gemma 2 can have, naming the field."""
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
    layers = config.num_hidden_layers
    if layers > MOST_LAYERS or config.parameter_count > MOST_PARAMETERS:
        raise ValueError(
            f"{layers:,} layers of {config.parameter_count:,} parameters are too many: "
            f"at most {MOST_LAYERS:,} and {MOST_PARAMETERS:,} are taken"
        )
    types = config.layer_types
    known = isinstance(types, tuple) and all(kind in (LOCAL, GLOBAL) for kind in types)
    if not known or len(types) != layers:
        raise ValueError(f"layer_types must name {layers} layers, each {LOCAL!r} or {GLOBAL!r}")
