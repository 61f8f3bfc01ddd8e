"""Gemma 2's architecture as numbers. Nothing here says anything about the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2.checks import check_config

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
        check_config(self, layer_types=(LOCAL, GLOBAL))

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
