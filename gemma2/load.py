"""One door: a name, a folder or a file in, a ready Gemma out."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from gemma2.checkpoints.adapter_tokenizer import with_tokenizer_of
from gemma2.checkpoints.adapters import check_around, open_adapter, plan_for
from gemma2.checkpoints.apply_adapter import apply_adapter, check_installed, note_of
from gemma2.checkpoints.checkpoint import named_tokenizer, naming_unreadable, open_checkpoint
from gemma2.checkpoints.dtypes import RUNNABLE, dtype_name
from gemma2.checkpoints.foreign import refuse_broken_links
from gemma2.checkpoints.mapped import check_mappable, map_weights
from gemma2.checkpoints.neutral import neutral
from gemma2.checkpoints.weights import build
from gemma2.distributed.device_map import DeviceMap, MaxMemory, build_spread, check_alone
from gemma2.errors import BadModelFile, said_of_device
from gemma2.fast.compiling import no_compiler, show_compiling
from gemma2.fast.forms import check_form, sizes_of
from gemma2.fast.speed import caches_of, speed_up
from gemma2.gemma import Gemma
from gemma2.hub import download, download_adapter, download_gguf, download_tokenizer
from gemma2.numerics import check_profile, storage_of, twins_of
from gemma2.tied import EMBEDDING
from gemma2.tokenizer import Tokenizer
from gemma2.twins import Make

POCKET = Path(__file__).parent / "assets" / "pocket"
SUFFIXES = (
    ".safetensors",
    ".gguf",
    ".ckpt",
    ".bin",
    ".pt",
    ".pth",
    ".model",
    ".json",
)  # of files, so never taken for a hub name
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FLOAT16 = (
    "float16 is too narrow for Gemma 2 (it holds nothing beyond 65,504, so activations can overflow to infinity): "
    "use bfloat16 or float32, or force it with force_float16=True (--force-float16)"
)
STORED_FLOAT16 = (
    'holds float16, in which Gemma 2 overflows: it runs in float32, which holds all its values; dtype="bfloat16" '
    "takes half the memory"
)
STORED_FLOAT64 = 'holds float64 and runs in it; dtype="float32" takes half the memory'


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
    weights: str | None = None,
    fast: bool = False,
    compile: bool = False,
    adapter: str | Path | None = None,
    merge_adapter: bool = False,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    mapped: bool = False,
    progress: bool | None = None,
) -> Gemma:
    """Load a Gemma 2.

    Args:
        source: None or "pocket" for the pocket model inside this package; a Hugging Face folder; a `.gguf` file, or any
            part of a split one; a `.safetensors` file, a `.bin` or `.pt` of PyTorch or Google's `.ckpt` (its
            `config.json` and tokenizer beside it); or a hub name such as `google/gemma-2-2b`, `owner/repo:file.gguf`,
            or `owner/repo:Q4_K_M` if one GGUF alone has that in its name.
        device: default the best present: cuda, mps, cpu.
        dtype: float32, bfloat16 or float64; default the dtype the checkpoint stores, float32 if that is float16, and
            bfloat16 for a GGUF other than F32.
        tokenizer: takes the place of the checkpoint's: a `tokenizer.model` or `tokenizer.json`, a folder or GGUF with
            a tokenizer, a hub name as above (its tokenizer alone is downloaded), or a `Tokenizer`. What a folder, a
            GGUF or a repository says about chat comes with its tokenizer: ids at which a text ends, and the chat
            template.
        revision: branch, tag or commit, for a hub name.
        force_float16: run in float16 all the same.
        allow_nonfinite: take weights with NaN or infinity in them.
        numerics: compute as another implementation does, rounding for rounding: one of the profiles of
            `gemma2/numerics/__init__.py`, as "gemma_pytorch" or "llama.cpp" (which computes in float32).
        make: puts twins of modules in before any weight is read, see `gemma2.twins.replaced`: packed linears, say.
        weights: the form to hold the weights in: "int8", "int4", "bnb-nf4" or "bnb-int8" (see `gemma2/fast/forms.py`).
            Each is quantized as it is read, so the whole is never in memory.
        fast: put in the faster twins of `gemma2/fast`: the same model, rounded a little differently. The default is the
            exact reference.
        compile: `fast`, and the decode step compiled layer by layer, with single tokens in float32. The first text
            waits for the compiler, which is shown. It needs a C++ compiler on a CPU; without one a note says so.
        adapter: a PEFT adapter (LoRA, DoRA, rsLoRA, IA3) to put into the model: a folder, or a hub name as
            `owner/repo`. It needs the package peft. A tokenizer, a chat template and end ids in its folder are used
            too, unless `tokenizer` is given; a note says so. See `gemma2/checkpoints/apply_adapter.py` for what it
            computes in.
        merge_adapter: add it into the weights, so that the model can be written; PEFT is then out of it again.
        device_map: "auto" spreads the layers over all GPUs, memory and the disk, by accelerate; or a map of one's own.
        max_memory, offload_folder: for a device_map, see `gemma2.distributed.device_map.build_spread`.
        mapped: leave the weights of safetensors files where they are, and map the files: a CPU then has a model at
            once, however large. Values are not checked to be finite before they are used; `generate` raises
            NonFiniteError where they are not. A change of a weight does not reach the file. See
            `gemma2.checkpoints.mapped.map_weights` for what must not happen to the files meanwhile.
        progress: a bar while loading; None shows it on a terminal only.
    Raises:
        ImportError: an adapter, and no peft; a device_map, and no accelerate.
        MemoryError: there is too little memory; says how much is needed, how much is free, and what would fit.
        BadModelFile: anything that is not exactly a Gemma 2 this program runs; says what, where, and the cure.
        ValueError: an argument that cannot be.
    """
    if device_map is not None:
        faster = fast or compile or None
        check_alone(device=device, numerics=numerics, make=make, weights=weights, fast=faster, adapter=adapter)
    elif max_memory is not None or offload_folder is not None:
        raise ValueError("max_memory and offload_folder are for a device_map: give that too")
    where = parse_device(device)
    if mapped:
        check_mappable(where, device_map)
    wanted = parse_dtype(dtype, force_float16)
    if numerics is not None:
        check_profile(numerics)
        if make is not None:
            raise ValueError("numerics and make both replace modules: give one of them")
        if fast or compile:
            raise ValueError("numerics computes as another implementation does, and fast does not: give one of them")
        wanted = wanted or (torch.float32 if numerics == "llama.cpp" else None)
    form = None if weights is None else check_form(weights)
    if form is not None and (numerics is not None or make is not None):
        raise ValueError("weights, numerics and make all replace modules: give one of them")
    if form is not None and merge_adapter:
        raise ValueError("merge_adapter adds to the weights, and weights= quantizes them: write the merged model first")
    if adapter is None and merge_adapter:
        raise ValueError("merge_adapter says to merge an adapter, and none is given with adapter")
    if adapter is not None and (numerics is not None or make is not None):
        raise ValueError(
            "an adapter goes around Gemma 2's own modules, and numerics and make replace them: write the merged model "
            "with convert, and load that"
        )
    added = None if adapter is None else open_adapter(locate_adapter(adapter, tokenizer_given=tokenizer is not None))
    if added is not None:
        check_installed()
    given = named_tokenizer(locate_tokenizer(tokenizer))
    opened = open_checkpoint(locate(source, revision, tokenizer_given=given is not None), given)  # gigabytes, so last
    plan = None if added is None else plan_for(added, opened.config, merge=merge_adapter)
    if plan is not None and form is not None:
        check_around(plan)
    if added is not None and given is None:
        opened = with_tokenizer_of(opened, added.where)
    final, notes = wanted or opened.weights.dtype, opened.notes
    _, stored = opened.weights.tensors.get(EMBEDDING, (None, None))
    if wanted is None and opened.form != "gguf" and stored == torch.float16:
        final = torch.float16 if force_float16 else final
        notes = notes if force_float16 else (*notes, f"{opened.path} {STORED_FLOAT16}")
    if wanted is None and opened.form != "gguf" and stored == torch.float64:
        notes = (*notes, f"{opened.path} {STORED_FLOAT64}")
    if numerics is not None:
        make = twins_of(numerics, None, final, storage_of(opened.weights))
    if form is not None:
        make, said = form(opened, where, final)
        notes = (*notes, said)
    views = None
    if mapped:
        views, said = map_weights(opened.weights, opened.form, final)
        notes = (*notes, said)
    if device_map is not None:
        folder = None if offload_folder is None else Path(offload_folder).expanduser()
        model, said = build_spread(
            opened.weights,
            opened.config,
            final,
            device_map,
            max_memory,
            folder,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        notes = (*notes, said)
    else:
        model = build(
            opened.weights,
            opened.config,
            where,
            final,
            make=make,
            others=partial(sizes_of, opened, where, final),
            views=views,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if added is not None and plan is not None:
        apply_adapter(model, added, plan, merge=merge_adapter)
        notes = (*notes, note_of(added, plan, merge_adapter))
    if fast or compile:
        missing = no_compiler(where) if compile else None
        notes = (*notes, missing) if missing else notes
        compile = compile and not missing
        speed_up(model, compile=compile)
        if compile:
            show_compiling(progress)
    return Gemma(
        model,
        opened.tokenizer,
        opened.chat_tuned,
        notes,
        opened.chat_template,
        opened.end_ids,
        companions=opened.companions,
        cache=caches_of(model),
    )


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device to run on; None is the best present. Raises ValueError for one that is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(best if device is None else device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device {str(device)!r} is not available here ({said_of_device(error)})") from None
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


def locate(source: str | Path | None, revision: str | None = None, *, tokenizer_given: bool = False) -> Path:
    """The local path of a name, folder or file, which is downloaded if it is on the hub.

    None and "pocket" are the pocket model, and "pocket:NAME.gguf" is a file beside it, unless a file or folder has that
    name.

    Args:
        tokenizer_given: the files of the tokenizer are not wanted from the hub.
    """
    if source is None:
        return POCKET
    path = Path(source).expanduser()
    if _is_there(path):
        if path.is_file() or path.is_dir():
            return path
        raise BadModelFile(f"{source}: neither a file nor a folder")
    refuse_broken_links([path])
    name, colon, file = str(source).partition(":")
    if name == "pocket" and (not colon or (file == Path(file).name and (POCKET / file).is_file())):
        return POCKET / file
    if isinstance(source, str) and REPOSITORY.fullmatch(name):
        if colon:
            return download_gguf(name, file, revision)
        if path.suffix not in SUFFIXES:
            return download(name, revision, tokenizer_given=tokenizer_given)
    raise BadModelFile(
        f"{source}: no such file or folder, nor a hub name like google/gemma-2-2b or owner/repo:file.gguf"
    )


def locate_adapter(adapter: str | Path, *, tokenizer_given: bool = False) -> Path:
    """The local folder of a PEFT adapter, which is downloaded if it is on the hub."""
    path = Path(adapter).expanduser()
    if isinstance(adapter, str) and not _is_there(path) and REPOSITORY.fullmatch(adapter):
        return download_adapter(adapter, tokenizer_given=tokenizer_given)
    return path


def locate_tokenizer(given: str | Path | Tokenizer | None) -> Path | Tokenizer | None:
    """A hub name as the local path of that repository's tokenizer, or of its GGUF file; anything else as it is.

    Names are as in `locate`, and the files are of the repository's main branch.
    """
    if not isinstance(given, str):
        return given
    path, (name, colon, _) = Path(given).expanduser(), given.partition(":")
    if not _is_there(path):
        if name == POCKET.name or (colon and REPOSITORY.fullmatch(name)):
            return locate(given)
        if REPOSITORY.fullmatch(name) and path.suffix not in SUFFIXES:
            return download_tokenizer(name)
    return path


def _is_there(path: Path) -> bool:
    """Whether there is a file or folder. Raises BadModelFile where that cannot be seen, as in a folder of others."""
    with naming_unreadable(path):
        return path.exists()
