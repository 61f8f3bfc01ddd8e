"""One door: a name, a folder or a file in, a ready Gemma out."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE, dtype_name
from gemma2.checkpoints.neutral import neutral
from gemma2.checkpoints.weights import EMBEDDING, build
from gemma2.errors import BadModelFile, first_line
from gemma2.gemma import Gemma
from gemma2.hub import download, download_gguf
from gemma2.numerics import check_profile, storage_of, twins_of
from gemma2.tokenizer import Tokenizer
from gemma2.twins import Make

POCKET = Path(__file__).parent / "assets" / "pocket"
SUFFIXES = (".safetensors", ".gguf", ".ckpt")  # of files, so never taken for a hub name
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FLOAT16 = (
    "float16 is too narrow for Gemma 2 (it holds nothing beyond 65,504, so activations can overflow to infinity): "
    "use bfloat16 or float32, or force it with force_float16=True (--force-float16)"
)
STORED_FLOAT16 = (
    'holds float16, in which Gemma 2 overflows: it runs in float32, which holds all its values; dtype="bfloat16" '
    "takes half the memory"
)


@neutral
def load(
    source: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    force_float16: bool = False,
    allow_nonfinite: bool = False,
    numerics: str | None = None,
    make: Make | None = None,
    progress: bool | None = None,
) -> Gemma:
    """Load a Gemma 2.

    Args:
        source: None or "pocket" for the pocket model inside this package; a Hugging Face folder; a `.gguf` file, or any
            part of a split one; a `.safetensors` file or Google's `.ckpt` (its `config.json` and `tokenizer.model`
            beside it); or a hub name such as `google/gemma-2-2b`, `owner/repo:file.gguf`, or `owner/repo:Q4_K_M` if one
            GGUF alone has that in its name.
        device: default the best present: cuda, mps, cpu.
        dtype: float32, bfloat16 or float64; default the dtype the checkpoint stores, float32 if that is float16, and
            bfloat16 for a GGUF other than F32.
        tokenizer: a `tokenizer.model` elsewhere, or a ready one.
        revision: branch, tag or commit, for a hub name.
        force_float16: run in float16 all the same.
        allow_nonfinite: take weights with NaN or infinity in them.
        numerics: compute as another implementation does, rounding for rounding: one of the profiles of
            `gemma2/numerics/__init__.py`, as "gemma_pytorch" or "llama.cpp" (which computes in float32).
        make: puts twins of modules in before any weight is read, see `gemma2.twins.replaced`: packed linears, say.
        progress: a bar while loading; None shows it on a terminal only.
    Raises:
        BadModelFile: anything that is not exactly a Gemma 2 this program runs; says what, where, and the cure.
        ValueError: an argument that cannot be.
    """
    where = parse_device(device)
    wanted = parse_dtype(dtype, force_float16)
    if numerics is not None:
        check_profile(numerics)
        if make is not None:
            raise ValueError("numerics and make both replace modules: give one of them")
        wanted = wanted or (torch.float32 if numerics == "llama.cpp" else None)
    opened = open_checkpoint(locate(source, revision), tokenizer)
    final, notes = wanted or opened.weights.dtype, opened.notes
    _, stored = opened.weights.tensors.get(EMBEDDING, (None, None))
    if wanted is None and opened.form != "gguf" and stored == torch.float16:
        final = torch.float16 if force_float16 else final
        notes = notes if force_float16 else (*notes, f"{opened.path} {STORED_FLOAT16}")
    if numerics is not None:
        make = twins_of(numerics, None, final, storage_of(opened.weights))
    model = build(
        opened.weights, opened.config, where, final, make=make, allow_nonfinite=allow_nonfinite, progress=progress
    )
    return Gemma(model, opened.tokenizer, opened.chat_tuned, notes, opened.chat_template, opened.end_ids)


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device to run on; None is the best present. Raises ValueError for one that is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(best if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device {str(device)!r} is not available here ({first_line(error)})") from None
    if found.type == "meta":
        raise ValueError("device 'meta' holds no values, so nothing can be loaded there")
    return found


def parse_dtype(dtype: str | torch.dtype | None, force_float16: bool = False) -> torch.dtype | None:
    """A dtype by name or itself; None for None. Raises ValueError for one that Gemma 2 does not run in, and for float16
    unless it is forced."""
    if dtype is None:
        return None
    found = RUNNABLE.get(dtype_name(dtype))
    if found is None:
        raise ValueError(f"dtype {str(dtype)!r} is not one of {', '.join(RUNNABLE)}")
    if found == torch.float16 and not force_float16:
        raise ValueError(FLOAT16)
    return found


def locate(source: str | Path | None, revision: str | None = None) -> Path:
    """The local path of a name, folder or file, which is downloaded if it is on the hub.

    None and "pocket" are the pocket model, and "pocket:NAME.gguf" is a file beside it, unless a file or folder has that
    name.
    """
    if source is None:
        return POCKET
    path = Path(source).expanduser()
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise BadModelFile(f"{source}: neither a file nor a folder")
    name, colon, file = str(source).partition(":")
    if name == "pocket" and (not colon or (file == Path(file).name and (POCKET / file).is_file())):
        return POCKET / file
    if isinstance(source, str) and REPOSITORY.fullmatch(name):
        if colon:
            return download_gguf(name, file, revision)
        if path.suffix not in SUFFIXES:
            return download(name, revision)
    raise BadModelFile(
        f"{source}: no such file or folder, nor a hub name like google/gemma-2-2b or owner/repo:file.gguf"
    )
