"""Make a small random Gemma 2, let other programs compute with it, and compare what they compute with ours.

    python scripts/make_parity_model.py FOLDER [--gemma-pytorch SOURCE]
    python scripts/make_parity_model.py tests/golden/parity --cut --gemma-pytorch SOURCE --force

Needs the extra `llama-cpp`. FOLDER gets the model (`scripts/parity_model.py` says how it comes from a seed) in Hugging
Face's format and as `f32.gguf`; a GGUF of every type that llama.cpp's own quantizer writes, and `mixed.gguf`, in which
every matrix has another type; and `llama_cpp_logits.safetensors`, what llama.cpp computes with each, keys and values in
float32 and flash attention off. With the source folder of google/gemma_pytorch (revision 014acb7) it also gets that
program's traces in float32 and bfloat16. A table says how far each is from ours.

llama.cpp must be built without AMX: its kernels for that add in an order of their own, which the profile does not
follow, and the logits that they give differ from those of all other x86 processors. On a processor that has AMX:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"

--cut keeps what the repository holds: a few of the files, and the last positions of llama.cpp's values.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import parity_model
import torch
from compare_llama_cpp import STEPS, row
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from gemma2 import convert
from gemma2.atomic import replacing
from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checkpoints.ggml import TYPES
from gemma2.checkpoints.gguf import read_header
from gemma2.errors import BadModelFile
from gemma2.parity.judge import judge
from gemma2.parity.machine import stated
from gemma2.parity.references import open_reference
from gemma2.parity.trace import About, TraceWriter

CUT = ("q8_0", "q4_k_m", "q2_k", "mixed")  # the tests make f32, f16 and bf16 of the seed
RECORDED = ("f32", "f16", "bf16", *CUT)
LAST = 8  # positions whose logits are kept
SITES = {"f32": 2, "q4_k_m": 4}  # and those of whose passes every site is kept, for so many positions
GOOGLE = ("blocks.*.hook_resid_post", "ln_final", "logits")
# Types that the other files of the cut do not have, one for each matrix.
MIXED = {
    "token_embd": "Q5_K",
    "blk.0.attn_q": "Q4_0",
    "blk.0.attn_k": "Q5_0",
    "blk.0.attn_v": "IQ3_S",
    "blk.0.attn_output": "IQ4_NL",
    "blk.0.ffn_gate": "IQ3_XXS",
    "blk.0.ffn_up": "IQ2_S",
    "blk.0.ffn_down": "Q4_1",
    "blk.1.attn_q": "IQ4_XS",
    "blk.1.attn_k": "MXFP4",
    "blk.1.attn_v": "Q5_1",
    "blk.1.attn_output": "TQ2_0",
    "blk.1.ffn_gate": "IQ1_S",
    "blk.1.ffn_up": "TQ1_0",
    "blk.1.ffn_down": "IQ2_XXS",
}


def file_types(llama_cpp: Any) -> dict[str, int]:
    """Every type of file that llama.cpp knows, by name as "q4_k_m"."""
    prefix = "LLAMA_FTYPE_MOSTLY_"
    return {
        name.removeprefix(prefix).lower(): value for name, value in vars(llama_cpp).items() if name.startswith(prefix)
    }


@contextmanager
def quiet(llama_cpp: Any) -> Iterator[None]:
    """Without llama.cpp's notes on every tensor."""
    callback = llama_cpp.llama_log_callback(lambda level, text, _: None)
    llama_cpp.llama_log_set(callback, None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


def quantize(llama_cpp: Any, source: Path, target: Path, kind: int, tensors: dict[str, str] | None = None) -> bool:
    """Whether llama.cpp writes such a file. Types that need an importance matrix get one of ones."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = 1, kind
    if tensors:
        types = {known.name: known.id for known in TYPES.values()}
        overrides = (
            llama_cpp.llama_model_tensor_override * (len(tensors) + 1)
        )()  # the last, without a pattern, ends it
        for override, (pattern, name) in zip(overrides, tensors.items(), strict=False):
            override.pattern, override.type = pattern.encode(), types[name]
        options.tt_overrides = overrides
    with quiet(llama_cpp):
        if not llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
            return True
        options.imatrix = keep = importance(llama_cpp, source)
        written = not llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
        del keep
    if not written:
        target.unlink(missing_ok=True)
    return written


def importance(llama_cpp: Any, source: Path) -> Any:
    """An importance matrix of ones."""
    shapes = matrices(source)
    found = (llama_cpp.llama_model_imatrix_data * (len(shapes) + 1))()
    for entry, (name, columns) in zip(found, shapes.items(), strict=False):
        entry.name, entry.size = name.encode(), columns
        entry.data = (ctypes.c_float * columns)(*[1.0] * columns)
    return found


def matrices(source: Path) -> dict[str, int]:
    """llama.cpp's name of each matrix of a GGUF -> its columns."""
    return {name: info.shape[-1] for name, info in read_header(source).tensors.items() if len(info.shape) == 2}


def write_files(llama_cpp: Any, place: Path, wanted: tuple[str, ...] | None) -> list[str]:
    """The GGUF files, from llama.cpp's quantizer but for F32. Returns the types that it does not write."""
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "parity-model"  # this name goes into the files
        folder.mkdir()
        convert(parity_model.write_folder(folder, gguf=True), place / "f32.gguf", type="f32", progress=False)
    kinds = {name: kind for name, kind in file_types(llama_cpp).items() if wanted is None or name in wanted}
    refused = []
    for name, kind in tqdm(kinds.items(), desc="quantizing", leave=False):
        if not quantize(llama_cpp, place / "f32.gguf", place / f"{name}.gguf", kind):
            refused.append(name)
    if not quantize(llama_cpp, place / "f32.gguf", place / "mixed.gguf", kinds["q8_0"], MIXED):
        raise SystemExit("llama.cpp does not write the mixed file: it is another version than 0.3.36")
    return refused


def record_llama_cpp(place: Path, ids: list[int], files: list[str]) -> list[str]:
    """The logits of every file, and every site of some, for the last positions. Returns why files were left out."""
    unread = []
    logits: dict[str, Tensor] = {}
    made: dict[str, str] = {}
    for name in tqdm(files, desc="llama.cpp", leave=False):
        try:
            external = open_reference("llama.cpp", place / f"{name}.gguf")
        except BadModelFile as error:
            unread.append(str(error))
            continue
        found = external.run(ids, external.sites if name in SITES else ["logits"])
        system = "llama.cpp in llama-cpp-python " + external.versions["llama-cpp-python"]
        about = {"system": system, "keys and values": "float32", "flash attention": "off", "ids": ids}
        made = {"made": json.dumps(about)}  # one string: of several, the order in a safetensors file is left to chance
        logits[name] = found["logits"][-LAST:].contiguous()
        if name in SITES:
            kept = {
                site: _last_positions(site, value, SITES[name])
                for site, value in found.items()
                if not site.endswith("resid_pre")  # what is the site before it
            }
            save_file(kept, place / f"llama_cpp_sites_{name}.safetensors", metadata=made)
    save_file(logits, place / "llama_cpp_logits.safetensors", metadata=made)
    return unread


def _last_positions(site: str, value: Tensor, count: int) -> Tensor:
    """Scores and patterns are [h t s], all else [t ...]."""
    queries = value[:, -count:] if site.endswith(("scores_raw", "pattern")) else value[-count:]
    return queries.contiguous()


def record_google(source: Path, folder: Path, place: Path, ids: list[int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        external = open_reference(f"gemma_pytorch:{source}", folder, dtype)
        named = dtype_name(dtype)
        versions = {**external.versions, **stated(external.config, len(ids), dtype)}
        about = About(external.system, named, external.config, versions)
        with TraceWriter(place / f"gemma_pytorch_{named}.safetensors", about, ids, GOOGLE, dtype) as trace:
            for site, value in external.run(ids, trace.sites).items():
                trace.add(site, value)


def print_llama_cpp(place: Path, ids: list[int]) -> None:
    print(f"| file | {' | '.join(STEPS)} | same top token |\n|---|{'---|' * len(STEPS)}---|")
    for name, reference in load_file(place / "llama_cpp_logits.safetensors").items():
        print(row(place / f"{name}.gguf", ids, reference), flush=True)


def print_google(place: Path, opened: Checkpoint, ids: list[int]) -> None:
    print("\n| gemma_pytorch in | numerics | verdict | sites with its bits |\n|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        for numerics in (None, "gemma_pytorch"):
            external = open_reference(str(place / f"gemma_pytorch_{dtype}.safetensors"), opened.path)
            found = judge(external, opened, ids, numerics=numerics, cases=False)
            equal = sum(each.bitwise for each in found.rows)
            print(f"| {dtype} | {numerics or 'none'} | {found.verdict} | {equal} of {len(found.rows)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where it is written; must not be there")
    parser.add_argument("--gemma-pytorch", type=Path, metavar="SOURCE", help="a checkout of google/gemma_pytorch")
    parser.add_argument("--cut", action="store_true", help="only what tests/golden/parity holds")
    parser.add_argument("--force", action="store_true", help="replace the folder if it is there")
    args = parser.parse_args()
    if args.folder.exists() and not args.force:
        parser.error(f"{args.folder} is there already; --force replaces it")
    if args.cut and not args.gemma_pytorch:
        parser.error("--cut needs --gemma-pytorch: the repository holds that program's traces too")
    try:
        import llama_cpp
    except (ImportError, RuntimeError, OSError) as error:
        raise SystemExit(f"llama.cpp is not installed: pip install llama-cpp-python ({error})") from None
    torch.set_num_threads(1)  # an order of sums of its own could come with more
    if b"AMX" in llama_cpp.llama_print_system_info():
        raise SystemExit("this llama.cpp is built with AMX; build it without, as scripts/make_parity_model.py -h says")
    ids = parity_model.ids()
    with replacing(args.folder, folder=True) as (place,), tempfile.TemporaryDirectory() as beside:
        folder = parity_model.write_folder(Path(beside))
        refused = write_files(llama_cpp, place, RECORDED if args.cut else None)
        written = sorted(path.stem for path in place.glob("*.gguf"))
        unread = record_llama_cpp(place, ids, written)
        if args.gemma_pytorch:
            record_google(args.gemma_pytorch, folder, place, ids)
        print_llama_cpp(place, ids)
        if args.gemma_pytorch:
            print_google(place, open_checkpoint(folder), ids)
        for name in refused:
            print(f"not written by llama.cpp: {name}")
        for why in unread:
            print(f"not read here: {why}")
        if args.cut:
            for name in set(written) - set(CUT):
                (place / f"{name}.gguf").unlink()
            readme = args.folder / "README.md"
            if readme.exists():
                shutil.copy(readme, place)
        else:
            for path in folder.iterdir():
                shutil.copy(path, place)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"\n{args.folder}: {size:,} bytes")


if __name__ == "__main__":
    main()
