"""PEFT's `adapter_config.json`: what may stand in it, and what is applied of it.

PEFT matches strings of it as regular expressions and imports a module that it names. So only plain names are taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gemma2.errors import BadModelFile

KINDS = ("LORA", "IA3")
PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)
MERGED = "apply it with PEFT, merge it there (merge_and_unload, save_pretrained) and load that folder"
NAME = re.compile(r"\^?\w+(\.\w+)*")
INITS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,3})?")  # olora and pissa change the base's weights too
MOST_RANK, MOST_NAMES, MOST_ALPHA = 2**16, 4096, 1e30


def _names(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) <= MOST_NAMES
    return fits and all(isinstance(name, str) and NAME.fullmatch(name) for name in value)


def _indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and len({*value}) == len(value)


def _pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and _names([*value]) and all(map(fits, value.values()))


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_RANK


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MOST_ALPHA


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


# What a config may state, how it must look, and how the rule reads. Null means that it is not stated.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (lambda v: isinstance(v, str), "a string"),
    "task_type": (lambda v: v == "CAUSAL_LM", "CAUSAL_LM or null"),
    "r": (_rank, f"a whole number from 1 to {MOST_RANK}"),
    "lora_alpha": (_number, "a number"),
    "target_modules": (lambda v: isinstance(v, str) or _names(v), "a list of names, or a string"),
    "exclude_modules": (_names, "a list of names"),
    "modules_to_save": (_names, "a list of names"),
    "feedforward_modules": (_names, "a list of names"),
    "layers_to_transform": (lambda v: _indices([v]) or _indices(v), "a layer's number or a list of them"),
    "rank_pattern": (_pattern(_rank), "an object from names to ranks"),
    "alpha_pattern": (_pattern(_number), "an object from names to numbers"),
    "trainable_token_indices": (
        lambda v: _indices(v.get("embed_tokens") if isinstance(v, dict) and len(v) == 1 else v),
        "a list of token ids, for embed_tokens",
    ),
    "use_dora": (_flag, "true or false"),
    "use_rslora": (_flag, "true or false"),
    "lora_bias": (_flag, "true or false"),
    "ensure_weight_tying": (_flag, "true or false"),
    "init_lora_weights": (
        lambda v: _flag(v) or (isinstance(v, str) and bool(INITS.fullmatch(v))),
        "true, false, gaussian, orthogonal, olora or pissa",
    ),
    "auto_mapping": (lambda v: isinstance(v, dict), "an object"),
}
# What changes the computation in ways that are not checked here.
REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# What has no effect here: the training, or how the weights began, which the file's own replace.
IDLE = (
    "inference_mode",
    "init_ia3_weights",
    "layers_pattern",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
)


def check_config(config: Any, where: str) -> None:
    """Raises BadModelFile, in one line, for a parsed `adapter_config.json` that is not applied here, or malformed."""
    if not isinstance(config, dict):
        raise BadModelFile(f"{where}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or not kind.isprintable():
        raise BadModelFile(f"{where}: no peft_type that is a string, so not a PEFT adapter")
    if kind in PROMPTS:
        raise BadModelFile(
            f"{where}: peft_type is {kind}: it puts learned vectors before the prompt, which is not done here; "
            "use transformers with PEFT"
        )
    if kind not in KINDS:
        raise BadModelFile(f"{where}: peft_type is {kind:.40}; applied are LORA (DoRA, rsLoRA too) and IA3; {MERGED}")
    for name, (fits, rule) in RULES.items():
        value = config.get(name)
        if value is not None and not fits(value):
            raise BadModelFile(f"{where}: {name} must be {rule}, not {_shown(value)}")
    for name in REFUSED:
        if config.get(name):
            raise BadModelFile(f"{where}: {name} is {_shown(config[name])}, which is not applied here; {MERGED}")
    known = (*RULES, *REFUSED, *IDLE)
    unknown = [name for name, value in config.items() if name not in known and _is_on(value)]
    if unknown:
        raise BadModelFile(f"{where}: {_shown(unknown[0])} is set, and what it does is not known here; {MERGED}")
    needed = ("r", "lora_alpha", "target_modules") if kind == "LORA" else ("target_modules",)
    missing = [name for name in needed if config.get(name) is None]
    if "target_modules" in missing and config.get("trainable_token_indices"):
        missing.remove("target_modules")
    if missing:
        raise BadModelFile(f"{where}: missing {', '.join(missing)}")


def _is_on(value: Any) -> bool:
    """Whether a key that nobody here knows switches something on. Numbers and strings are settings of a switch."""
    return value is True or (isinstance(value, dict | list) and bool(value))


def _shown(value: Any) -> str:
    """A value of a stranger's file, for a message."""
    return f"{value!r:.60}"
