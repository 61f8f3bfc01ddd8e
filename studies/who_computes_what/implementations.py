"""The implementations, each at a version."""

from __future__ import annotations

from dataclasses import dataclass

from studies.who_computes_what.findings import (
    ADDED_MASK,
    ADDED_MASK_EMPTY,
    EARLY_SHIFT,
    GGUF_SCALE,
    HF_SWAPPED,
    LENS_SWAPPED,
    OWN_CHUNK,
    SHORT,
    TABLE_GELU,
    TORCHTUNE,
    UNCAPPED,
    UNCAPPED_AND_SHORT,
    XLA,
    Finding,
)

DTYPES = ("float32", "bfloat16")
BASE = ("torch==2.13.0", "safetensors==0.8.0")  # in every environment
LLAMA_CPP = ("llama-cpp-python==0.3.36", "-e .")
# What it asks for by way of kauldron (xmanager, and with it all of Google's cloud) pip does not resolve.
GEMMA = """
    gemma==3.3.0 --no-deps kauldron==1.4.2 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 clu==0.0.12 tensorflow==2.21.0
    keras==3.15.1 absl-py==2.5.1 astunparse==1.6.3 certifi charset-normalizer==3.5.2 chex==0.1.92 einops==0.8.2
    etils==1.15.0 filelock==4.2.12 flatbuffers==25.12.19 fsspec gast==0.7.0 google-pasta==0.2.0 grpcio==1.85.3
    h5py==3.14.0 humanize==4.17.0 idna==3.20 immutabledict==4.3.1 jaxtyping==0.3.11 jinja2==3.1.6 lark==1.3.1
    libclang==18.1.1 markdown-it-py==4.3.0 markupsafe==3.0.4 mdurl==0.1.2 ml_collections==1.1.0 ml_dtypes==0.6.0
    mpmath==1.3.0 msgpack==1.2.4 namex==0.1.0 networkx==3.6.1 numpy==2.4.6 opt_einsum==3.4.0 optax==0.2.8
    optree==0.20.0 orbax-checkpoint==0.12.8 packaging==26.3 protobuf==7.36.2 psutil==7.2.2 pygments==2.21.0
    pyyaml==6.0.4 requests==2.34.2 rich==15.0.0 scipy==1.17.1 sentencepiece==0.2.3 setuptools==84.2.1
    simplejson==4.3.0 six==1.17.0 sympy==1.14.0 tensorstore==0.1.86 termcolor==3.3.0 toolz==1.2.0 tqdm==4.70.1
    treescope==0.1.10 typeguard==4.6.1 typing_extensions==4.16.0 urllib3==2.8.0 wadler_lindig==0.1.8 wrapt==2.5.2
    zipp==4.1.2
"""


@dataclass(frozen=True)
class Implementation:
    """One implementation at one version, by its recipe in `run_one.py` with these options."""

    name: str
    recipe: str
    requires: tuple[str, ...]
    options: tuple[str, ...] = ()
    model: str = "4 layers"
    dtypes: tuple[str, ...] = DTYPES
    finding: Finding | None = None
    numerics: str | None = None  # a profile that explains what is left in a narrow dtype
    refuses: bool = False  # whether it is known to refuse this model; another that does not build it was not run
    folder: str = ""  # that it is installed in, if its first requirement's would be another one's

    @property
    def environment(self) -> str:
        return self.folder or self.requires[0].replace("==", "-")


def transformers(
    number: str, attention: str = "eager", finding: Finding | None = None, refuses: bool = False
) -> Implementation:
    more: tuple[str, ...] = ("numpy<2",) if number in ("4.42.3", "4.42.4", "4.48.0") else ()
    if number == "5.23.0":
        more = ("gguf==0.19.0", "accelerate==1.15.0", "protobuf==7.36.2")
    name = f"transformers {number}, {attention}"
    requires, options = (f"transformers=={number}", *more), [f"attention={attention}"]
    if attention.startswith("default"):  # "default (sdpa)": it must be what is chosen where nothing is asked for
        options = ["attention=default", f"chosen={attention[9:-1]}"]
    return Implementation(name, "transformers", requires, tuple(options), finding=finding, refuses=refuses)


def lens(name: str, recipe: str, *requires: str, finding: Finding | None = None, folder: str = "") -> Implementation:
    return Implementation(f"TransformerLens {name}", recipe, requires, finding=finding, folder=folder)


def llama_cpp(name: str, model: str) -> Implementation:
    return Implementation(name, "llama.cpp", LLAMA_CPP, (), model, ("float32",), TABLE_GELU)


IMPLEMENTATIONS = [
    transformers("5.23.0"),
    transformers("5.23.0", "default (eager)"),
    transformers("5.23.0", "sdpa", refuses=True),
    transformers("5.23.0", "flex_attention"),
    transformers("5.20.2"),
    transformers("5.20.2", "default (sdpa)", UNCAPPED),
    transformers("4.57.1"),
    transformers("4.57.1", "default (sdpa)", UNCAPPED),
    transformers("4.51.3", finding=EARLY_SHIFT),
    transformers("4.48.0", finding=SHORT),
    transformers("4.48.0", "sdpa", UNCAPPED_AND_SHORT),
    transformers("4.42.4", finding=EARLY_SHIFT),
    transformers("4.42.3", finding=HF_SWAPPED),
    Implementation(
        "transformers 5.23.0, a GGUF of 46 layers",
        "transformers",
        transformers("5.23.0").requires,
        ("gguf=model.gguf",),
        "46 layers",
        finding=GGUF_SCALE,
    ),
    Implementation(
        "transformers 5.23.0, a folder of 46 layers", "transformers", transformers("5.23.0").requires, (), "46 layers"
    ),
    llama_cpp("llama.cpp in llama-cpp-python 0.3.36", "4 layers, query scale 16"),
    llama_cpp("llama.cpp in llama-cpp-python 0.3.36, 46 layers", "46 layers"),
    lens(
        "4.3.0, TransformerBridge on transformers 5.24.0",
        "transformer_bridge",
        "transformer-lens==4.3.0",
        "transformers==5.24.0",
        finding=OWN_CHUNK,
    ),
    lens(
        "4.3.0, TransformerBridge on transformers 5.23.0",
        "transformer_bridge",
        "transformer-lens==4.3.0",
        "transformers==5.23.0",
        folder="transformer-lens-4.3.0-transformers-5.23.0",
    ),
    lens("3.9.0, HookedTransformer", "transformer_lens", "transformer-lens==3.9.0", "transformers==5.24.0"),  # the last
    lens(
        "2.16.1, HookedTransformer",
        "transformer_lens",
        "transformer-lens==2.16.1",
        "datasets==2.21.0",
        "pyarrow==17.0.0",
        finding=LENS_SWAPPED,
    ),
    Implementation(
        "litgpt 0.5.13, as its generate() calls it",
        "litgpt",
        ("litgpt==0.5.13",),
        ("ends=yes",),
        finding=ADDED_MASK,
        numerics="litgpt",
    ),
    Implementation("litgpt 0.5.13", "litgpt", ("litgpt==0.5.13",), finding=ADDED_MASK_EMPTY, numerics="litgpt"),
    Implementation("torchtune 0.6.1", "torchtune", ("torchtune==0.6.1", "torchao==0.14.1"), finding=TORCHTUNE),
    Implementation(
        "nnsight 0.8.1",
        "nnsight",
        ("nnsight==0.8.1", "transformers==5.24.0", "sentencepiece==0.2.3", "protobuf==7.36.2", "tiktoken"),
    ),
    Implementation("google-deepmind/gemma 3.3.0", "deepmind", tuple(GEMMA.split()), finding=XLA, numerics="jax"),
]
