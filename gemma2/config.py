"""Gemma 2's architecture as numbers. Nothing here says anything about the machine it runs on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.errors import BadModelFile

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # the values of Hugging Face's `layer_types`
PUBLISHED = ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
ACTIVATION = "gelu_pytorch_tanh"
# Far above any Gemma 2: a config beyond them is a mistake, or made to exhaust memory before weights are looked at.
MOST_LAYERS, MOST_PARAMETERS = 1024, 10**13


@dataclass(frozen=True)
class Gemma2Config:
    """The shape of one Gemma 2. Field names are those of Hugging Face's `config.json`; none has a default.

    Raises:
        BadModelFile: a value has the wrong type or range, or two values contradict each other.
    """

    vocab_size: int  # v
    hidden_size: int  # d, the width of the residual stream
    intermediate_size: int  # f
    num_hidden_layers: int
    num_attention_heads: int  # h
    num_key_value_heads: int  # g
    head_dim: int  # c; h * c need not equal d (2B: 2048 against 2304)
    query_pre_attn_scalar: float  # scores are scaled by this ** -0.5; 27B: 144, not head_dim
    sliding_window: int  # positions a local layer sees, the query's own included
    max_position_embeddings: int  # the context the model was trained for
    attn_logit_softcapping: float
    final_logit_softcapping: float
    rms_norm_eps: float
    rope_theta: float
    layer_types: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (type(value) is int and 1 <= value < 2**31):  # positions are int32
                raise BadModelFile(f"config: {field.name} must be a positive integer below 2^31, not {value!r}")
            if field.type == "float" and not (_is_number(value) and 2**-126 <= value < 2**128):
                raise BadModelFile(f"config: {field.name} must be a positive finite float32, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise BadModelFile(
                f"config: num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise BadModelFile(f"config: head_dim must be even for rotary pairs, not {self.head_dim}")
        if self.rms_norm_eps > 0.1:
            raise BadModelFile(f"config: rms_norm_eps must be at most 0.1, not {self.rms_norm_eps!r}")
        if self.num_hidden_layers > MOST_LAYERS or self.parameter_count > MOST_PARAMETERS:
            raise BadModelFile(
                f"config: {self.num_hidden_layers:,} layers of {self.parameter_count:,} parameters are too many: "
                f"at most {MOST_LAYERS:,} and {MOST_PARAMETERS:,} are taken"
            )
        known = isinstance(self.layer_types, tuple) and all(kind in (LOCAL, GLOBAL) for kind in self.layer_types)
        if not known or len(self.layer_types) != self.num_hidden_layers:
            raise BadModelFile(
                f"config: layer_types must name {self.num_hidden_layers} layers, each {LOCAL!r} or {GLOBAL!r}"
            )

    def window(self, layer: int) -> int | None:
        """Positions that `layer` sees (its own included), or None where it sees everything before it."""
        return self.sliding_window if self.layer_types[layer] == LOCAL else None

    @property
    def parameter_count(self) -> int:
        """Parameters, the tied embedding counted once."""
        d, c = self.hidden_size, self.head_dim
        attention = 2 * d * c * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * d * self.intermediate_size + 4 * d
        return self.vocab_size * d + self.num_hidden_layers * layer + d

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> Gemma2Config:
        """Read the keys of a Hugging Face `config.json`. Unknown keys are ignored; no shape or scale is invented.

        Two things may be absent because Hugging Face documents their meaning: `layer_types` (layers alternate,
        the first is local) and `hidden_activation` beside an old `hidden_act`.

        Raises:
            BadModelFile: another architecture, missing fields (all named), or a value Gemma 2 does not have.
        """
        if not isinstance(raw, Mapping):
            raise BadModelFile(f"{where}: expected a JSON object, found {type(raw).__name__}")
        if raw.get("model_type") != "gemma2":
            raise BadModelFile(f"{where}: model_type is {raw.get('model_type')!r}, this program runs 'gemma2'")
        values = dict(raw)
        _flatten_rope(values, where)
        _refuse_other_arithmetic(values, where)
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in fields if values.get(name) is None and name != "layer_types"]
        if missing:
            raise BadModelFile(f"{where}: missing {', '.join(missing)}; a shape or a scale is never guessed")
        n = values["num_hidden_layers"]
        if values.get("layer_types") is None:
            # Hugging Face's documented default: even layers are local, so layer 0 is local and the last is global.
            n = n if type(n) is int and n <= MOST_LAYERS else 0  # refused below, by name
            values["layer_types"] = [LOCAL if i % 2 == 0 else GLOBAL for i in range(n)]
        if not isinstance(values["layer_types"], list | tuple):
            raise BadModelFile(f"{where}: layer_types must be a list, not {values['layer_types']!r}")
        values["layer_types"] = tuple(values["layer_types"])
        try:
            return cls(**{name: values[name] for name in fields})
        except BadModelFile as error:
            raise BadModelFile(str(error).replace("config:", f"{where}:", 1)) from None

    @classmethod
    def from_file(cls, path: str | Path) -> Gemma2Config:
        """Read a `config.json`. Raises BadModelFile also when it is not JSON."""
        return cls.from_dict(read_json(path), where=str(path))

    @classmethod
    def published(cls, name: str) -> Gemma2Config:
        """The config of `gemma-2-2b`, `gemma-2-9b` or `gemma-2-27b`, as Google published it."""
        if name not in (*PUBLISHED, "pocket"):
            raise ValueError(f"no published config {name!r}; there are {', '.join(PUBLISHED)}")
        return cls.from_file(Path(__file__).parent / "configs" / f"{name}.json")

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back, in Hugging Face's schema."""
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **dataclasses.asdict(self),
            "layer_types": list(self.layer_types),
            "hidden_activation": ACTIVATION,
            "tie_word_embeddings": True,
            "attention_bias": False,
        }


def read_json(path: str | Path) -> Any:
    """A JSON file's content. Raises BadModelFile naming the file when it is not UTF-8 JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5,000 digits
        raise BadModelFile(f"{path}: not valid JSON ({error})") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flatten_rope(values: dict[str, Any], where: str) -> None:
    """transformers 5 writes `rope_parameters` where older files have `rope_theta`; only plain rotary is Gemma 2."""
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, Mapping) or rope.get("rope_type") != "default":
            raise BadModelFile(f"{where}: rope_parameters {rope!r} is not Gemma 2's plain rotary embedding")
        if values.setdefault("rope_theta", rope.get("rope_theta")) != rope.get("rope_theta"):
            raise BadModelFile(f"{where}: rope_theta and rope_parameters disagree")
    if values.get("rope_scaling") is not None:
        raise BadModelFile(f"{where}: rope_scaling {values['rope_scaling']!r} is not part of Gemma 2")


def _refuse_other_arithmetic(values: Mapping[str, Any], where: str) -> None:
    """Settings under which the file would mean another computation than the one in `model.py`."""
    named = {str(values[key]) for key in ("hidden_activation", "hidden_act") if values.get(key) is not None}
    if named != {ACTIVATION}:
        found = ", ".join(sorted(named)) or "none"
        raise BadModelFile(f"{where}: activation must be {ACTIVATION}, found {found}")
    for key, only in (("tie_word_embeddings", True), ("attention_bias", False), ("use_bidirectional_attention", False)):
        if values.get(key, only) not in (only, None):
            raise BadModelFile(f"{where}: {key} is {values[key]!r}, Gemma 2 has {only}")
