"""Hugging Face's `config.json`: read strictly into a `Gemma2Config`, and written from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2.checkpoints.foreign import what_begins
from gemma2.checks import MOST_LAYERS
from gemma2.config import GLOBAL, LOCAL, Gemma2Config
from gemma2.errors import BadModelFile

PUBLISHED = ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
ACTIVATION_KEY, ACTIVATION = "hidden_activation", "gelu_pytorch_tanh"
TIED = "tie_word_embeddings"
# What transformers' Gemma2Config takes for a key that is absent, where all published sizes have that number.
DEFAULTS: dict[str, Any] = {
    ACTIVATION_KEY: ACTIVATION,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
HEAD_WIDTH = 256  # transformers' default of head_dim and query_pre_attn_scalar: that of 2B and 9B
NULLS = {
    "attn_logit_softcapping": "no cap on attention scores",
    "final_logit_softcapping": "no cap on logits",
    "sliding_window": "no sliding window",
}
MOST_JSON = 2**20  # bytes: an index of the 27B has 42,000 and a config.json 1,000; more is parsed slowly
PACKAGE = Path(__file__).resolve().parents[1]


def read_config(source: str | Path | Mapping[str, Any], where: str = "config") -> Gemma2Config:
    """A `config.json`, by its path or as the dict that it holds: `config_and_notes` without the notes."""
    return config_and_notes(source, where)[0]


def config_and_notes(
    source: str | Path | Mapping[str, Any], where: str = "config"
) -> tuple[Gemma2Config, tuple[str, ...]]:
    """A `config.json`, by its path or as the dict that it holds, and a line for everything that was filled in.

    Unknown keys are ignored, and what transformers ignores for Gemma 2 (`hidden_act`). No shape of the model is
    invented. What may be absent are the numbers that all published sizes share and that transformers' `Gemma2Config`
    fills in too, and `layer_types` (layers alternate, the first is local).

    Args:
        where: what error messages call a dict; a file is called by its path.
    Raises:
        BadModelFile: not JSON, another architecture, missing fields (all named), or a value Gemma 2 does not have.
    """
    if isinstance(source, str | Path):
        source, where = read_json(source, MOST_JSON), str(source)
    if not isinstance(source, Mapping):
        raise BadModelFile(f"{where}: expected a JSON object, found {type(source).__name__}")
    if source.get("model_type") != "gemma2":
        raise BadModelFile(f"{where}: model_type is {_said(source.get('model_type'))}, this program runs 'gemma2'")
    values = dict(source)
    _flatten_rope(values, where)
    _refuse_other_arithmetic(values, where)
    notes = _fill(values, where)
    fields = [field.name for field in dataclasses.fields(Gemma2Config)]
    missing = [name for name in fields if values.get(name) is None and name != "layer_types"]
    if missing:
        raise BadModelFile(f"{where}: missing {', '.join(missing)}; a shape or a scale is never guessed")
    n = values["num_hidden_layers"]
    if values.get("layer_types") is None:
        # Hugging Face's documented default: even layers are local, so layer 0 is local and the last is global.
        n = n if type(n) is int and n <= MOST_LAYERS else 0  # refused below, by name
        values["layer_types"] = [LOCAL if i % 2 == 0 else GLOBAL for i in range(n)]
    if not isinstance(values["layer_types"], list | tuple):
        raise BadModelFile(f"{where}: layer_types must be a list, not {_said(values['layer_types'])}")
    values["layer_types"] = tuple(values["layer_types"])
    try:
        return Gemma2Config(**{name: values[name] for name in fields}), tuple(notes)
    except ValueError as error:
        raise BadModelFile(f"{where}: {error!s:.500}") from None


def published_config(name: str) -> Gemma2Config:
    """The config of `gemma-2-2b`, `gemma-2-9b` or `gemma-2-27b`, as Google published it."""
    if name not in PUBLISHED:
        raise ValueError(f"no published config {name!r}; there are {', '.join(PUBLISHED)}")
    return read_config(configs() / f"{name}.json")


def configs() -> Path:
    """The folder `configs`: inside an installed package, and beside the package in a checkout.

    Raises:
        FileNotFoundError: it is missing in both places, so the installation is incomplete.
    """
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / f"{PUBLISHED[0]}.json").is_file():
            return folder
    raise FileNotFoundError(f"no folder 'configs' in {PACKAGE} or beside it: install gemma2 again")


def config_dict(config: Gemma2Config) -> dict[str, Any]:
    """The content of a `config.json`, in Hugging Face's schema; `read_config` reads it back."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **dataclasses.asdict(config),
        "layer_types": list(config.layer_types),
        ACTIVATION_KEY: ACTIVATION,
        TIED: True,
        "attention_bias": False,
    }


def read_json(path: str | Path, most: int | None = None) -> Any:
    """A JSON file's content. Raises BadModelFile naming the file when it is not UTF-8 JSON, or over `most` bytes."""
    path = Path(path)
    try:
        if most is not None and path.stat().st_size > most:
            raise BadModelFile(f"{path}: {path.stat().st_size:,} bytes are too many for such a file: at most {most:,}")
        return json.loads(path.read_text(encoding="utf-8"))
    except BadModelFile:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5,000 digits
        raise BadModelFile(f"{path}: not valid JSON ({what_begins(path, 'file') or error})") from None
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read ({error.strerror})") from None


def _fill(values: dict[str, Any], where: str) -> list[str]:
    """Put in what may be absent; a line for each. What is null is not absent: transformers takes it as it stands."""
    for name, meaning in NULLS.items():
        if name in values and values[name] is None:
            raise BadModelFile(
                f"{where}: {name} is null, which means {meaning}: every Gemma 2 has {DEFAULTS[name]:g} there, and this "
                "program runs none without"
            )
    absent = [name for name in DEFAULTS if values.get(name) is None and (name not in values or name == ACTIVATION_KEY)]
    notes = [f"{where} states no {name}: {DEFAULTS[name]}, as every published Gemma 2 has" for name in absent]
    values |= {name: DEFAULTS[name] for name in absent}
    for name in ("head_dim", "query_pre_attn_scalar"):
        # The 27B has other numbers, so a query scale is filled in only for heads as wide as the smaller sizes have.
        if name not in values and (name == "head_dim" or values.get("head_dim") == HEAD_WIDTH):
            values[name] = HEAD_WIDTH
            notes.append(f"{where} states no {name}: {HEAD_WIDTH}, as transformers, Gemma 2 2B and 9B have")
    ignored = values.get("hidden_act")
    if ignored is not None and ignored != ACTIVATION:
        notes.append(f"{where} states hidden_act {_said(ignored)}, which Gemma 2 ignores: it has {ACTIVATION}")
    return notes


def _flatten_rope(values: dict[str, Any], where: str) -> None:
    """transformers 5 writes `rope_parameters` where older files have `rope_theta`; only plain rotary is Gemma 2."""
    scaling, rope = values.pop("rope_scaling", None), values.pop("rope_parameters", None)
    for name, stated in (("rope_scaling", scaling), ("rope_parameters", rope)):
        if stated is None or stated == {}:
            continue
        plain = _plain_rope(stated)
        if plain is None:
            other = "part of Gemma 2" if name == "rope_scaling" else "Gemma 2's plain rotary embedding"
            raise BadModelFile(f"{where}: {name} {_said(stated)} is not {other}")
        theta = plain.get("rope_theta")
        if values.get("rope_theta") is None:
            values["rope_theta"] = theta
        if values["rope_theta"] is None:
            del values["rope_theta"]
        elif theta is not None and values["rope_theta"] != theta:
            raise BadModelFile(f"{where}: rope_theta and {name} disagree")


def _plain_rope(stated: object) -> Mapping[str, Any] | None:
    """One `rope_parameters` if that is plain rotary; all layers' if it has one for each kind of layer, all the same."""
    if not isinstance(stated, Mapping):
        return None
    if stated.keys() & {LOCAL, GLOBAL}:
        return _plain_rope(stated.get(LOCAL)) if stated.get(LOCAL) == stated.get(GLOBAL) else None
    kind = stated.get("rope_type", stated.get("type", "default"))
    return stated if kind == "default" else None


def _refuse_other_arithmetic(values: Mapping[str, Any], where: str) -> None:
    """Refuse settings under which the file would mean another computation than the one in `model.py`."""
    if values.get(ACTIVATION_KEY) not in (None, ACTIVATION):
        stated = {f"{values[key]!s:.100}" for key in (ACTIVATION_KEY, "hidden_act") if values.get(key) is not None}
        raise BadModelFile(f"{where}: activation must be {ACTIVATION}, found {', '.join(sorted(stated))}")
    tied = values.get(TIED)
    if not isinstance(tied, bool | None):
        raise BadModelFile(f"{where}: {TIED} is {_said(tied)}, Gemma 2 has True")
    for key, only in (("attention_bias", False), ("use_bidirectional_attention", False)):
        if values.get(key, only) not in (only, None):
            raise BadModelFile(f"{where}: {key} is {_said(values[key])}, Gemma 2 has {only}")
    if values.get("per_layer_config"):
        raise BadModelFile(f"{where}: per_layer_config is stated, and all layers of Gemma 2 have the same shape")


def _said(value: object) -> str:
    """A value for a message: a file can state one of any length."""
    return f"{value!r:.200}"
