"""What a file or folder is when it is no Gemma 2 that this program reads, and what to do with it."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gemma2.checkpoints.names import shown
from gemma2.errors import BadModelFile

MOST_NAMES = 10_000  # files of a folder that are looked at
INSTEAD = "use the unquantized model, or a GGUF of it"
EXPORT = "export it to Hugging Face's safetensors, or use google/gemma-2-2b, -9b or -27b"

# How files begin. GGUF stands apart: it is foreign only where another kind of file is expected.
HEADS: dict[str, Callable[[bytes], bool]] = {
    "an empty file": lambda h: not h,
    "a Git LFS pointer, not the {kind}: run `git lfs pull`": lambda h: h.startswith(b"version https://git-lfs"),
    "an HTML page, perhaps an error page that was saved": lambda h: (
        h.lstrip().lower().startswith((b"<!doctype", b"<html"))
    ),
    f"an HDF5 file, as Keras writes them: {EXPORT}": lambda h: h.startswith(b"\x89HDF\r\n\x1a\n"),
    f"a NumPy array: {EXPORT}": lambda h: h.startswith(b"\x93NUMPY"),
    f"a TensorFlow Lite model: {EXPORT}": lambda h: h[4:8] == b"TFL3",
    "a packed archive: unpack it and give the folder or file in it": lambda h: (
        h.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"BZh"))
        or h[257:262] == b"ustar"
    ),
    "a ggml file from before GGUF: convert it with the llama.cpp of its time, or get a GGUF": lambda h: h.startswith(
        (b"lmgg", b"fmgg", b"tjgg")
    ),
}
ENDINGS = {
    ".onnx": f"an ONNX model: {EXPORT}",
    ".msgpack": f"Flax weights: {EXPORT}",
    ".h5": f"Keras weights: {EXPORT}",
    ".keras": f"a Keras model: {EXPORT}",
    ".npz": f"NumPy arrays: {EXPORT}",
    ".sbs": f"weights of gemma.cpp: {EXPORT}",
    ".task": f"a MediaPipe model: {EXPORT}",
    ".tflite": f"a TensorFlow Lite model: {EXPORT}",
    ".distcp": "a piece of a distributed checkpoint: merge it with `accelerate merge-weights`, then load the result",
    ".json": "a JSON file, not weights: give its folder",
    ".model": "a tokenizer, not weights: give its folder",
}
# What files and folders inside a folder say it is, the first that fits.
FOLDERS: dict[str, str] = {
    r".*\.(incomplete|part|partial|crdownload|aria2|download)": "a download that did not finish: download it again",
    r"zero_pp_rank_.*|global_step\d+|bf16_zero_pp_rank_.*": (
        "a DeepSpeed checkpoint, whose weights are in pieces: merge them with its zero_to_fp32.py, then load what "
        "that wrote"
    ),
    r"pytorch_model_fsdp_\d+|.*\.distcp": (
        "an FSDP checkpoint, whose weights are in pieces: merge them with `accelerate merge-weights`, then load what "
        "that wrote"
    ),
    r".*\.weights\.h5|.*\.h5|.*\.keras": f"a Keras model: {EXPORT}",
    r"flax_model.*\.msgpack|_METADATA|manifest\.ocdbt|_CHECKPOINT_METADATA": f"a Flax checkpoint: {EXPORT}",
    r".*\.onnx": f"an ONNX model: {EXPORT}",
    r".*\.npz": f"NumPy arrays: {EXPORT}",
    r".*\.sbs": f"weights of gemma.cpp: {EXPORT}",
    r"optimizer\.(pt|bin)": "the state of an optimizer without weights: give the folder that has the model",
}
# What tensors' names say, the first that fits.
QUANTIZED: dict[str, str] = {
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)": "bitsandbytes",
    r".*\.quant_state\.bitsandbytes__.*": "bitsandbytes",
    r".*\.(g_idx)": "GPTQ",
    r".*\.(qweight|qzeros)": "GPTQ or AWQ",
    r".*\.(weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale|scale_weight)|scaled_fp8": (
        "compressed-tensors or FP8"
    ),
    r".*\.(scales|biases)": "MLX",
    r".*\.W_q": "HQQ",
    r".*\.(weight\._data|weight\._scale|weight:_?\w+)|.*weight_qdata": "torchao or quanto",
}
OTHERS: dict[str, str] = {
    r"(.*\.)?score\.(weight|bias)": "a classifier (Gemma2ForSequenceClassification), which has no language head: this "
    "program runs language models only, so use transformers",
    r"(.*\.)?(classifier|qa_outputs)\..*": "a token classifier, which has no language head: this program runs language "
    "models only, so use transformers",
    r"(.*\.)?v_head\..*": "a model with a value head, as trl trains with PPO: save its pretrained_model alone",
    r"(.*\.)?(vision_tower|multi_modal_projector|vision_model)\..*": "a model with a vision tower, such as PaliGemma "
    "2: save its language_model alone",
    r"transformer[./](layer_\d+|embedder)[./].*": f"under the names of DeepMind's Flax code: {EXPORT}",
    r".*(decoder_block_\d+|token_embedding/embeddings).*": f"under Keras's names: {EXPORT}",
    r".*\.(q_norm|k_norm)\.weight": "a Gemma 3, not a Gemma 2",
}
ADAPTER = re.compile(r".*\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\b.*")


def refuse_foreign(path: Path, *, gguf: bool = False, kind: str = "weights") -> None:
    """Raise BadModelFile, saying what a file is, when it begins as no checkpoint does.

    Args:
        gguf: whether a GGUF is foreign here too.
        kind: what the file should hold.
    """
    if path.is_dir():
        raise BadModelFile(f"{path}: a folder where a file was expected")
    what = what_begins(path, kind)
    if what:
        raise BadModelFile(f"{path}: {what}")
    with path.open("rb") as file:
        if gguf and file.read(4) == b"GGUF":
            raise BadModelFile(f"{path}: a GGUF file: give it itself")


def what_begins(path: Path, kind: str) -> str:
    """What a file is that begins as neither a checkpoint nor a small file of one does; nothing for others."""
    with path.open("rb") as file:
        head = file.read(512)
    return next((what.format(kind=kind) for what, holds in HEADS.items() if holds(head)), "")


def refuse_file(path: Path) -> NoReturn:
    """Say what a file is that has neither the content nor the name of a checkpoint."""
    refuse_foreign(path)
    name = path.name.lower()
    for ending, what in ENDINGS.items():
        if name.endswith(ending):
            raise BadModelFile(f"{path}: {what}")
    raise BadModelFile(
        f"{path}: give a folder, a .gguf, a .safetensors file or Google's .ckpt, or a .bin or .pt of PyTorch, not a "
        f"{path.suffix!r} file"
    )


def refuse_folder(folder: Path) -> None:
    """Say what a folder is that has no config.json or no weights, where that can be known."""
    names = _inside(folder)
    refuse_adapter(folder)
    snapshots = folder / "snapshots"
    if snapshots.is_dir():
        held = [snapshots / name for name in _inside(snapshots)]
        cure = f"give {_newest(folder, held)}" if held else "and nothing was downloaded into it"
        raise BadModelFile(f"{folder}: a folder of the Hugging Face cache: {cure}")
    cached = [name for name in names if name.startswith("models--")]
    if cached:
        named = cached[0].removeprefix("models--").replace("--", "/")
        raise BadModelFile(f"{folder}: a Hugging Face cache of {len(cached)} models: give a name, such as {named}")
    for pattern, what in FOLDERS.items():
        fits = [name for name in names if re.fullmatch(pattern, name)]
        if fits:
            raise BadModelFile(f"{folder}: {what} (it holds {fits[0]})")
    below = [name for name in names if _is_checkpoint(folder / name)]
    if below:
        best = max(below, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
        several = f", the last of {len(below)}" if len(below) > 1 else ""
        raise BadModelFile(f"{folder}: no checkpoint itself, but a folder of some: give {folder / best}{several}")


def refuse_broken_links(paths: Iterable[Path]) -> None:
    """Say that a file is a link to nothing, as in a hub cache that was moved or copied in part."""
    for path in paths:
        if not path.is_symlink():
            continue
        try:
            path.stat()
        except FileNotFoundError:
            to = os.readlink(path)
            raise BadModelFile(
                f"{path}: a link to {to}, which is not there: download it again, or copy a hub cache whole"
            ) from None
        except OSError:  # it links to itself, or may not be followed
            continue


def refuse_adapter(folder: Path) -> None:
    """Say that a folder holds a PEFT adapter, and of which model."""
    stated = folder / "adapter_config.json"
    held = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not stated.is_file() and not held:
        return
    base = _stated(stated).get("base_model_name_or_path")
    known = isinstance(base, str) and base
    named = f"{base!r:.100}" if known else "BASE"
    raise BadModelFile(
        f"{folder}: a PEFT adapter{f' of {named}' if known else ''}, not a model: load its base with it, as "
        f"gemma2.load({named}, adapter={str(folder)!r})"
    )


def refuse_names(names: Collection[str], where: str, config: Mapping[str, Any]) -> None:
    """Say what a checkpoint is whose tensors do not fit, by their names and by what its config.json says of them."""
    how = quantization(config) or _first(QUANTIZED, names)
    if how:
        raise BadModelFile(f"{where}: quantized by {how}, which is not read: {INSTEAD}")
    adapted = next((name for name in names if ADAPTER.fullmatch(name)), None)
    if adapted:
        refuse_adapter(Path(where) if Path(where).is_dir() else Path(where).parent)
        raise BadModelFile(
            f"{where}: a model with a PEFT adapter that is not merged ({shown(adapted)}): merge it with "
            "merge_and_unload(), and save that"
        )
    what = _first(OTHERS, names)
    if what:
        raise BadModelFile(f"{where}: {what}")


def quantization(config: Mapping[str, Any]) -> str:
    """What quantized a model, as its config.json says; nothing where that says nothing."""
    stated = config.get("quantization_config")
    stated = stated if isinstance(stated, Mapping) else {}
    method = stated.get("quant_method")
    if isinstance(config.get("quantization"), Mapping) and not method:
        stated, method = config["quantization"], "MLX"
    if not isinstance(method, str) or not method.isprintable():
        return "an unknown method" if stated else ""
    four, eight = stated.get("load_in_4bit") is True, stated.get("load_in_8bit") is True
    n = 4 if four else 8 if eight else stated.get("bits")
    bits = f" to {n} bits" if isinstance(n, int) and 0 < n <= 64 else ""
    return f"{method:.40}{bits}"


def refuse_pickle(path: Path, found: object) -> None:
    """Say what a pickle is that holds no state dict alone: `found` is what it held, or why it was not read."""
    if path.name == "training_args.bin" or (isinstance(found, str) and "TrainingArguments" in found):
        raise BadModelFile(f"{path}: the settings of a training run, not weights: give the folder of the model")
    if isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys():
        raise BadModelFile(f"{path}: the state of an optimizer, not weights: give the folder of the model")


def refuse_zip(path: Path, entries: Iterable[str]) -> None:
    """Say what a zip is that PyTorch did not write."""
    names = list(itertools.islice(entries, MOST_NAMES))
    if any(name.endswith(".npy") for name in names):
        raise BadModelFile(f"{path}: {ENDINGS['.npz']}")
    if any(name.endswith(".h5") for name in names):
        raise BadModelFile(f"{path}: {ENDINGS['.keras']}")
    if any(name.endswith((".safetensors", ".gguf", ".ckpt", ".bin", "config.json")) for name in names):
        raise BadModelFile(f"{path}: a packed archive: unpack it and give the folder or file in it")


def _first(table: Mapping[str, str], names: Iterable[str]) -> str:
    joined = {pattern: re.compile(pattern) for pattern in table}
    listed = list(names)
    return next((table[p] for p, fits in joined.items() if any(fits.fullmatch(name) for name in listed)), "")


def _inside(folder: Path) -> list[str]:
    """The names in a folder, in order."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in itertools.islice(found, MOST_NAMES))


def _is_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _newest(folder: Path, snapshots: list[Path]) -> Path:
    """The snapshot that the branch main stands at, or the only or first one."""
    main = folder / "refs" / "main"
    with main.open("rb") if main.is_file() else open(os.devnull, "rb") as file:
        commit = file.read(64).decode("ascii", "replace").strip()
    return next((path for path in snapshots if path.name == commit), snapshots[0])


def _stated(path: Path) -> Mapping[str, Any]:
    """A small JSON object of which only a hint is wanted; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(2**20))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
