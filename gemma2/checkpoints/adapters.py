"""A PEFT adapter on disk: `adapter_config.json` and its tensors, checked before anything is computed.

It is read without PEFT, and nothing of it is run. PEFT warns of tensors that are missing or left over, and goes on with
random values; here they are refused by name. `apply_adapter.py` puts the adapter into a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma2.checkpoints.adapter_config import MERGED, check_config
from gemma2.checkpoints.dtypes import PLAIN, dtype_name
from gemma2.checkpoints.hf_config import read_json
from gemma2.checkpoints.pickled import PickledFile
from gemma2.checkpoints.safetensors_file import SafetensorsFile
from gemma2.checkpoints.weights import TensorFile, shapes_of
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile

CONFIG, SAFE, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
DELTA = "token_adapter.trainable_tokens_delta"
# What PEFT also keeps of an embedding and a head where the embedding was resized: the name under each wrapper.
KEPT = ("", ".base_layer", ".original_module", ".modules_to_save", ".token_adapter.base_layer")
# Of these, copies of another tensor of the adapter.
COPIES = {f"{path}.modules_to_save.weight": f"{path}.weight" for path in (EMBEDDING, HEAD)} | {
    f"{HEAD}.{name}": f"{EMBEDDING}.{name}" for name in (DELTA, "token_adapter.base_layer.weight")
}
NOT_MERGED = (
    "it trains the head apart from the embedding, and in a Gemma 2 they are one matrix: load it without merging "
    "(merge_adapter=False)"
)
T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """What `open_adapter` gives.

    Attributes:
        where: its folder.
        config: the content of `adapter_config.json`.
        tensors: name, without PEFT's prefix -> shape.
    """

    where: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def base(self) -> str | None:
        """The name of the model that it was made for, as it states it."""
        stated = self.config.get("base_model_name_or_path")
        return stated if isinstance(stated, str) and stated.isprintable() and 0 < len(stated) <= 200 else None

    @property
    def tied(self) -> bool:
        """Whether the head follows a trained embedding. With transformers' model it does so only when asked to."""
        mapping = self.config.get("auto_mapping") or {}
        return bool(self.config.get("ensure_weight_tying")) or mapping.get("base_model_class") == "Gemma2"


@dataclass(frozen=True)
class Plan:
    """Where an adapter goes in a model, by modules' paths.

    Attributes:
        targets: those that it goes around.
        saved: those that it holds whole.
        tokens: ids whose rows of the embedding it trains; None for none.
        own_head: whether the head becomes a matrix of its own.
        tensors: the adapter's, by PEFT's names, on the CPU.
    """

    targets: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: list[int] | None
    own_head: bool
    tensors: Mapping[str, Tensor]


def check_around(plan: Plan) -> None:
    """Raises ValueError for a plan that has to change matrices, and not only to go around linears."""
    matrices = [path for path in plan.saved if not path.endswith("norm")]
    trained = [EMBEDDING] if plan.tokens else [path for path in plan.targets if path in (EMBEDDING, HEAD)] + matrices
    if trained:
        raise ValueError(
            f"the adapter changes {trained[0]} itself, which cannot be with weights=: write the merged model with "
            "convert, and load that with weights="
        )


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter's folder. The values of its tensors are not read.

    Raises:
        BadModelFile: no adapter, one of a kind that is not applied here, or a config that is malformed.
    """
    if not folder.is_dir():
        what = "a file: give the folder that it is in" if folder.is_file() else "no such folder"
        raise BadModelFile(f"{folder}: {what}; an adapter is a folder with {CONFIG} and {SAFE}")
    if not (folder / CONFIG).is_file():
        whole = " (it holds a config.json: a whole model is no adapter)" if (folder / "config.json").is_file() else ""
        raise BadModelFile(f"{folder}: no {CONFIG}, so not a PEFT adapter{whole}")
    config = read_json(folder / CONFIG)
    check_config(config, str(folder / CONFIG))
    return Adapter(folder, config, _shapes(folder))


def plan_for(adapter: Adapter, config: Gemma2Config, *, merge: bool = False) -> Plan:
    """Where the adapter goes in a model of this config. This reads its tensors.

    Args:
        merge: it is to be added into the weights.
    Raises:
        BadModelFile: it names modules that Gemma 2 does not have, or its tensors are not those that its config and the
            model's ask for: missing, surplus or misshapen ones, by name. Or it cannot be merged, or holds NaN.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in shapes_of(config).items()}
    shapes[HEAD] = shapes[EMBEDDING]
    _check_rows(adapter, config)
    targets = _targets(adapter, shapes)
    saved = _found(adapter, "modules_to_save", [path for path in shapes if path not in targets])
    tokens = adapter.config.get("trainable_token_indices")
    tokens = tokens["embed_tokens"] if isinstance(tokens, dict) else tokens
    expected: dict[str, tuple[int, ...]] = {f"{path}.weight": shapes[path] for path in saved}
    for path in targets:
        expected |= _expected(adapter, path, shapes[path])
    if tokens:
        if max(tokens) >= config.vocab_size or {EMBEDDING, HEAD} & {*targets, *saved}:
            raise BadModelFile(f"{adapter.where}: trainable_token_indices are not rows of a model's own embedding")
        expected[f"{EMBEDDING}.{DELTA}"] = (len(tokens), config.hidden_size)
    # PEFT keeps the embedding too where it is a target or was resized; and the head with one that is tied to it.
    also = {f"{path}{own}.weight": shapes[path] for path in (EMBEDDING, HEAD) for own in KEPT}
    also |= {f"{HEAD}.{DELTA}": (len(tokens), config.hidden_size)} if tokens else {}
    _check_tensors(adapter, expected, {name: shape for name, shape in also.items() if name not in expected})
    own_head = HEAD in targets or (not adapter.tied and bool({EMBEDDING, HEAD} & {*saved}))
    if adapter.tied and HEAD in saved and EMBEDDING not in saved:
        raise BadModelFile(f"{adapter.where}: it ties the embedding to a head that it trains; {MERGED}")
    if merge and (own_head or EMBEDDING in targets):
        raise BadModelFile(f"{adapter.where}: {NOT_MERGED}")
    return Plan(targets, saved, tokens or None, own_head, _values(adapter, own_head))


def _values(adapter: Adapter, own_head: bool) -> dict[str, Tensor]:
    """The tensors by PEFT's names, with one for the embedding and the head where these are tied."""
    found = _read(adapter.where)
    bad = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if bad:
        raise BadModelFile(f"{adapter.where}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:5])}")
    original = "original_module.weight"
    copies = COPIES | ({} if own_head else {f"{HEAD}.{original}": f"{EMBEDDING}.{original}"})
    for copy in [name for name in copies if name in found]:
        own, of = found.pop(copy), copies[copy]
        if of not in found or not torch.equal(found[of], own):
            raise BadModelFile(f"{adapter.where}: {copy} differs from {of}, and they are one")
    embedding, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
    if head in found and not own_head:
        own = found.pop(head)
        if not torch.equal(found.setdefault(embedding, own), own):
            raise BadModelFile(f"{adapter.where}: {head} differs from {embedding}, and the config ties them")
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def _check_rows(adapter: Adapter, config: Gemma2Config) -> None:
    """Raises BadModelFile, with the cure, for an adapter that was trained after the embedding was resized."""
    whole = [f"{path}{own}.weight" for path in (EMBEDDING, HEAD) for own in KEPT]
    shapes = {adapter.tensors[name] for name in whole if name in adapter.tensors}
    if len(shapes) != 1:
        return
    shape = shapes.pop()
    if len(shape) == 2 and shape[0] != config.vocab_size and shape[1] == config.hidden_size:
        raise BadModelFile(
            f"{adapter.where}: its embedding has {shape[0]:,} rows, and the model's {config.vocab_size:,}: it was "
            f"trained on a resized base; with transformers, load the base, call resize_token_embeddings({shape[0]}) "
            "and save_pretrained, put the adapter's tokenizer there, and give that folder as the base"
        )


def _targets(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The modules that the adapter goes around. Where they are stated by a pattern, which is not run, those of its
    tensors."""
    stated = adapter.config.get("target_modules")
    matrices = [path for path, shape in shapes.items() if len(shape) == 2]
    linears = [path for path in matrices if path not in (EMBEDDING, HEAD)]
    if stated == "all-linear":
        named = linears
    elif isinstance(stated, str):
        ends = (".lora_A.weight", ".lora_embedding_A", ".ia3_l")
        paths = {name.removesuffix(end) for name in adapter.tensors for end in ends if name.endswith(end)}
        named = [path for path in matrices if path in paths]
    else:
        named = [*_found(adapter, "target_modules", matrices)]
        if adapter.config.get("ensure_weight_tying") and EMBEDDING in named and HEAD not in named:
            named.append(HEAD)  # PEFT puts an adapter of its own there
    layers = adapter.config.get("layers_to_transform")
    if layers is not None:
        kept = {str(layer) for layer in ([layers] if isinstance(layers, int) else layers)}
        named = [path for path in named if path.startswith("model.layers.") and path.split(".")[2] in kept]
    without = adapter.config.get("exclude_modules") or []
    return tuple(path for path in named if not any(_is(path, name) for name in without))


def _found(adapter: Adapter, key: str, paths: list[str]) -> tuple[str, ...]:
    """The paths that a list of the config names."""
    names = adapter.config.get(key) or []
    fits = _is if key == "target_modules" else str.endswith  # as PEFT has it
    absent = [name for name in names if not any(fits(path, name) for path in paths)]
    if absent:
        made = f"; it was made for {adapter.base}" if adapter.base else ""
        raise BadModelFile(
            f"{adapter.where}: {key} has {', '.join(absent[:5])}, and Gemma 2 has no such module to take{made}"
        )
    return tuple(path for path in paths if any(fits(path, name) for name in names))


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _expected(adapter: Adapter, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors around one module, by PEFT's names."""
    config, (rows, columns) = adapter.config, shape
    if adapter.config["peft_type"] == "IA3":
        return {f"{path}.ia3_l": (1, columns) if is_feedforward(adapter, path) else (rows, 1)}
    ranks = [rank for name, rank in (config.get("rank_pattern") or {}).items() if _is_pattern(path, name)]
    r = ranks[0] if ranks else config["r"]
    if path == EMBEDDING:
        if config.get("use_dora") or config.get("lora_bias"):
            raise BadModelFile(f"{adapter.where}: use_dora and lora_bias are not applied to the embedding; {MERGED}")
        return {f"{path}.lora_embedding_A": (r, rows), f"{path}.lora_embedding_B": (columns, r)}
    found: dict[str, tuple[int, ...]] = {f"{path}.lora_A.weight": (r, columns), f"{path}.lora_B.weight": (rows, r)}
    if config.get("use_dora"):
        found[f"{path}.lora_magnitude_vector"] = (rows,)
    if config.get("lora_bias"):
        found[f"{path}.lora_B.bias"] = (rows,)
    return found


def is_feedforward(adapter: Adapter, path: str) -> bool:
    """Whether IA3 scales what goes into this module, and not what comes out of it."""
    return path.endswith(tuple(adapter.config.get("feedforward_modules") or ()))


def _is_pattern(path: str, name: str) -> bool:
    return path == name[1:] if name.startswith("^") else _is(path, name)


def _check_tensors(
    adapter: Adapter, expected: Mapping[str, tuple[int, ...]], also: Mapping[str, tuple[int, ...]]
) -> None:
    found = adapter.tensors
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected and name not in also],
        "misshapen": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in (dict(also) | dict(expected)).items()
            if name in found and found[name] != shape
        ],
    }
    lines = [
        f"{len(names)} {problem}: {', '.join(name[:200] for name in names[:3])}{' ...' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if lines:
        made = f"; it was made for {adapter.base}" if adapter.base else ""
        raise BadModelFile(f"{adapter.where}: the adapter does not fit the model: {'; '.join(lines)}{made}")
    if not expected:
        raise BadModelFile(f"{adapter.where}: the adapter changes nothing: it names no module")


def _file(folder: Path) -> TensorFile:
    """The weights of an adapter, under the names that the file has for them."""
    if (folder / SAFE).is_file():
        return SafetensorsFile(folder / SAFE)
    if not (folder / PICKLE).is_file():
        raise BadModelFile(f"{folder}: neither {SAFE} nor {PICKLE}, so the adapter has no weights")
    return PickledFile(folder / PICKLE)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    file = _file(folder)
    for name, (_, dtype) in file.tensors.items():
        if dtype not in PLAIN.values():
            raise BadModelFile(
                f"{file.path}: {name:.200} is {dtype_name(dtype)}, not float64, float32, bfloat16 or float16"
            )
    return {name: shape for name, (shape, _) in _plain(file.tensors, folder).items()}


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter, by their names without the prefix. Their shapes have been checked."""
    file = _file(folder)
    return _plain({name: file.rows(name, 0, shape[0]) for name, (shape, _) in file.tensors.items()}, folder)


def _plain(named: Mapping[str, T], folder: Path) -> dict[str, T]:
    """Tensors by their names without PEFT's prefix, and without that of torch.compile."""
    found: dict[str, T] = {}
    for name, tensor in named.items():
        plain = name.removeprefix(PREFIX).replace("_orig_mod.", "")
        if plain in found:
            raise BadModelFile(f"{folder}: two tensors are called {plain:.200}")
        found[plain] = tensor
    return found
