"""Hugging Face's `config.json`: read strictly into a `Gemma2Config`, and written from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2.checks import MOST_LAYERS
from gemma2.config import GLOBAL, LOCAL, Gemma2Config
from gemma2.errors import BadModelFile

PUBLISHED = ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
ACTIVATION = "gelu_pytorch_tanh"
PACKAGE = Path(__file__).resolve().parents[1]


def read_config(source: str | Path | Mapping[str, Any], where: str = "config") -> Gemma2Config:
    """A `config.json`, by its path or as the dict that it holds.

    Unknown keys are ignored; no shape or scale is invented. Two things may be absent because Hugging Face documents
    their meaning: `layer_types` (layers alternate, the first is local) and `hidden_activation` beside an old
    `hidden_act`.

    Args:
        where: what error messages call a dict; a file is called by its path.
    Raises:
        BadModelFile: not JSON, another architecture, missing fields (all named), or a value Gemma 2 does not have.
    """
    if isinstance(source, str | Path):
        source, where = read_json(source), str(source)
    if not isinstance(source, Mapping):
        raise BadModelFile(f"{where}: expected a JSON object, found {type(source).__name__}")
    if source.get("model_type") != "gemma2":
        raise BadModelFile(f"{where}: model_type is {source.get('model_type')!r}, this program runs 'gemma2'")
    values = dict(source)
    _flatten_rope(values, where)
    _refuse_other_arithmetic(values, where)
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
        raise BadModelFile(f"{where}: layer_types must be a list, not {values['layer_types']!r}")
    values["layer_types"] = tuple(values["layer_types"])
    try:
        return Gemma2Config(**{name: values[name] for name in fields})
    except ValueError as error:
        raise BadModelFile(f"{where}: {error}") from None


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


def _flatten_rope(values: dict[str, Any], where: str) -> None:
    """transformers 5 writes `rope_parameters` where older files have `rope_theta`; only plain rotary is Gemma 2."""
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, Mapping) or rope.get("rope_type") != "default":
            raise BadModelFile(f"{where}: rope_parameters {rope!r} is not Gemma 2's plain rotary embedding")
        if values.get("rope_theta") is None:
            values["rope_theta"] = rope.get("rope_theta")
        if values["rope_theta"] != rope.get("rope_theta"):
            raise BadModelFile(f"{where}: rope_theta and rope_parameters disagree")
    if values.get("rope_scaling") is not None:
        raise BadModelFile(f"{where}: rope_scaling {values['rope_scaling']!r} is not part of Gemma 2")


def _refuse_other_arithmetic(values: Mapping[str, Any], where: str) -> None:
    """Refuse settings under which the file would mean another computation than the one in `model.py`."""
    named = {str(values[key]) for key in ("hidden_activation", "hidden_act") if values.get(key) is not None}
    if named != {ACTIVATION}:
        found = ", ".join(sorted(named)) or "none"
        raise BadModelFile(f"{where}: activation must be {ACTIVATION}, found {found}")
    for key, only in (("tie_word_embeddings", True), ("attention_bias", False), ("use_bidirectional_attention", False)):
        if values.get(key, only) not in (only, None):
            raise BadModelFile(f"{where}: {key} is {values[key]!r}, Gemma 2 has {only}")
