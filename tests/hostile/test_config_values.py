"""Values in a config.json that are not a Gemma 2's: refused by field and value, before any weights are looked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.checkpoints.hf_config import read_config
from gemma2.config import GLOBAL, LOCAL
from tests.conftest import raw_config
from tests.hostile.conftest import SMALL

INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings"),
)
FLOATS = (
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps", "rope_theta"),
)
ABSENT = object()
nan, inf = float("nan"), float("inf")
# What may be absent, and what is null with a meaning of its own.
FILLED = ("head_dim", *FLOATS[1:], "sliding_window", "max_position_embeddings")
NULLS = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
# json.dumps writes NaN and Infinity as Python's parser reads them.
BAD: dict[str, Any] = {
    "absent": ABSENT,
    "null": None,
    "string": "8",
    "true": True,
    "false": False,
    "zero": 0,
    "negative": -1,
    "NaN": nan,
    "infinity": inf,
    "negative infinity": -inf,
    "list": [8],
    "object": {"value": 8},
    "empty": "",
    "of 400 digits": 10**400,
}
BAD_INTEGER = BAD | {"a half": 2.5, "a whole float": 8.0, "2^31": 2**31}
BAD_FLOAT = BAD | {"negative zero": -0.0, "beyond float32": 1e39, "beneath float32": 1e-40}
SINGLE = [(name, kind, value) for name in INTEGERS for kind, value in BAD_INTEGER.items()]
SINGLE += [(name, kind, value) for name in FLOATS for kind, value in BAD_FLOAT.items()]


def test_the_tables_name_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(gemma2.Gemma2Config)}
    assert fields == {*INTEGERS, *FLOATS, "layer_types"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A folder with nothing but a config.json: what is refused for its config is refused before anything else."""

    def written(**changes: Any) -> Path:
        raw = {**raw_config(vocab_size=4096, **SMALL), **changes}
        text = json.dumps({key: value for key, value in raw.items() if value is not ABSENT})
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        return tmp_path

    return written


@pytest.mark.parametrize(("name", "kind", "value"), SINGLE, ids=[f"{name}-{kind}" for name, kind, _ in SINGLE])
def test_a_field_of_a_wrong_type_or_range_is_refused_by_name(
    name: str, kind: str, value: object, write: Callable[..., Path], refused: Callable[[Path, str], None]
) -> None:
    if value is ABSENT and name in FILLED:
        assert read_config(write(**{name: value}) / "config.json")
        return
    kinds = "positive integer below 2^31" if name in INTEGERS else "positive finite float32"
    words = f"missing {name};" if value in (ABSENT, None) else f"{name} must be a {kinds}, not {value!r}"
    if value is None and name in NULLS:
        words = f"{name} is null, which means no "
    refused(write(**{name: value}), f"config.json: {words}")


ACTIVATION, ROPE = "activation must be gelu_pytorch_tanh, found ", "is not Gemma 2's plain rotary embedding"
LAYERS = f"layer_types must name 2 layers, each '{LOCAL}' or '{GLOBAL}'"
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"model_type": "llama"}, "model_type is 'llama', this program runs 'gemma2'"),
    "gemma": ({"model_type": "gemma"}, "model_type is 'gemma', this"),
    "gemma3": ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text', this"),
    "model type in capitals": ({"model_type": "Gemma2"}, "model_type is 'Gemma2', this"),
    "no model type": ({"model_type": ABSENT}, "model_type is None, this"),
    "a list for a model type": ({"model_type": ["gemma2"]}, "model_type is ['gemma2'], this"),
    "kv heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention"),
    "more kv heads than heads": ({"num_key_value_heads": 8}, "num_key_value_heads 8 does not divide num_attention"),
    "odd head width": ({"head_dim": 5}, "head_dim must be even for rotary pairs, not 5"),
    "an epsilon like a share": ({"rms_norm_eps": 0.5}, "rms_norm_eps must be at most 0.1, not 0.5"),
    "46 layers without heads": (
        {"num_hidden_layers": 46, "num_attention_heads": ABSENT},
        "missing num_attention_heads",
    ),
    "several missing": (
        {"hidden_size": ABSENT, "vocab_size": ABSENT},
        "missing vocab_size, hidden_size; a shape or a scale",
    ),
    "too many layers": ({"num_hidden_layers": 1025}, "1,025 layers of "),
    "layers that would fill memory": ({"num_hidden_layers": 2**31 - 1}, "2,147,483,647 layers of "),
    "too many parameters": ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "2 layers of 4,611,6"),
    "unknown activation": ({"hidden_activation": "swish"}, f"{ACTIVATION}swish"),
    "the exact gelu": ({"hidden_activation": "gelu"}, f"{ACTIVATION}gelu"),
    "an activation that is no name": (
        {"hidden_activation": 1, "hidden_act": "gelu_pytorch_tanh"},
        f"{ACTIVATION}1, gelu",
    ),
    "layer types too few": ({"layer_types": [LOCAL]}, LAYERS),
    "layer types too many": ({"layer_types": [LOCAL, GLOBAL, LOCAL]}, LAYERS),
    "layer types of none": ({"layer_types": []}, LAYERS),
    "layer type unknown": ({"layer_types": [LOCAL, "chunked_attention"]}, LAYERS),
    "layer type null": ({"layer_types": [LOCAL, None]}, LAYERS),
    "layer type a list": ({"layer_types": [LOCAL, [GLOBAL]]}, LAYERS),
    "layer type a number": ({"layer_types": [0, 1]}, LAYERS),
    "layer types a string": ({"layer_types": LOCAL}, f"layer_types must be a list, not '{LOCAL}'"),
    "layer types an object": ({"layer_types": {"0": LOCAL, "1": GLOBAL}}, "layer_types must be a list, not {"),
    "layer types a number": ({"layer_types": 2}, "layer_types must be a list, not 2"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {'type': 'linear', 'factor'"),
    "scaling a string": ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is not part of Gemma 2"),
    "yarn": ({"rope_parameters": {**PLAIN, "rope_type": "yarn"}}, ROPE),
    "rope by layer type, unequal": ({"rope_parameters": {LOCAL: PLAIN, GLOBAL: {"rope_theta": 1e6}}}, ROPE),
    "rope of one layer type": ({"rope_parameters": {LOCAL: PLAIN}}, ROPE),
    "rope by layer type, nested": ({"rope_parameters": {LOCAL: {LOCAL: PLAIN}, GLOBAL: {LOCAL: PLAIN}}}, ROPE),
    "rope a string": ({"rope_parameters": "default"}, f"rope_parameters 'default' {ROPE}"),
    "rope a list": ({"rope_parameters": [PLAIN]}, ROPE),
    "two bases": ({"rope_parameters": {**PLAIN, "rope_theta": 1e6}}, "rope_theta and rope_parameters disagree"),
    "a base that is null": ({"rope_theta": None}, "missing rope_theta"),
    "base a string": (
        {"rope_parameters": {**PLAIN, "rope_theta": "1e4"}, "rope_theta": ABSENT},
        "rope_theta must be a positive finite float32, not '1e4'",
    ),
    "tying a string": ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true', Gemma 2 has True"),
    "biased": ({"attention_bias": True}, "attention_bias is True, Gemma 2 has False"),
    "both ways": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True, Gemma 2 has False"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_another_model_or_a_contradiction_is_refused(
    case: str, write: Callable[..., Path], refused: Callable[[Path, str], None]
) -> None:
    changes, words = TOGETHER[case]
    refused(write(**changes), f"config.json: {words}" if words != ROPE else words)


RAW: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"model_type": "gemma2", ', "not valid JSON"),
    "two objects": (b"{}{}", "not valid JSON"),
    "single quotes": (b"{'model_type': 'gemma2'}", "not valid JSON"),
    "a comment": (b'{"model_type": "gemma2"} // yes', "not valid JSON"),
    "not UTF-8": (b'{"model_type": "gemma2\xff"}', "not valid JSON"),
    "UTF-16": ('{"model_type": "gemma2"}'.encode("utf-16"), "not valid JSON"),
    "with a BOM": (b'\xef\xbb\xbf{"model_type": "gemma2"}', "not valid JSON"),
    "HTML": (b"<!doctype html>", "not valid JSON"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
    "100,000 deep": (b"[" * 100_000, "not valid JSON"),
    "a number of 5,000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "NULs": (bytes(100), "not valid JSON"),
    "a list": (b"[]", "expected a JSON object, found list"),
    "a string": (b'"gemma2"', "expected a JSON object, found str"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "an empty object": (b"{}", "model_type is None, this program runs 'gemma2'"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_config_that_is_no_json_object_is_refused(
    case: str, tmp_path: Path, refused: Callable[[Path, str], None]
) -> None:
    raw, words = RAW[case]
    (tmp_path / "config.json").write_bytes(raw)
    refused(tmp_path, f"config.json: {words}")


def test_what_says_the_same_in_other_words_is_read(write: Callable[..., Path]) -> None:
    plain = read_config(write() / "config.json")
    same: tuple[dict[str, Any], ...] = (
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
        {"layer_types": [LOCAL, GLOBAL]},
        {"rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_theta": ABSENT},
        {"rope_scaling": None, "rope_parameters": None, "attention_bias": False, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {LOCAL: PLAIN, GLOBAL: PLAIN}, "rope_theta": ABSENT},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"hidden_act": "gelu"},
        {"hidden_activation": ABSENT},
        {"some_future_key": [1, {"x": None}], "torch_dtype": "float99", "_name_or_path": "../../etc"},
    )
    for changes in same:
        assert read_config(write(**changes) / "config.json") == plain, changes


def test_the_constructor_checks_what_no_file_can_hold() -> None:
    good = read_config(raw_config())
    odd: list[tuple[str, Any]] = [("layer_types", None), ("layer_types", list(good.layer_types)), ("vocab_size", 512.0)]
    for name, value in odd:
        with pytest.raises(ValueError, match=f"{name} must") as found:
            dataclasses.replace(good, **{name: value})
        assert not isinstance(found.value, gemma2.BadModelFile), "no file is at fault"
