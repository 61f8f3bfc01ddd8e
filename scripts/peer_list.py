"""The peers, each at a version, and what was found that it computes instead."""

from __future__ import annotations

from dataclasses import dataclass

from peer_changes import (
    Change,
    added_mask,
    as_torchtune,
    changed,
    early_shift,
    own_chunk,
    swapped,
    with_cache,
    without_score_cap,
)
from peer_models import CAPACITY, RUNS

DTYPES = ("float32", "bfloat16")
LONG = frozenset({"64", "64 cached", "64 from 8"})
ALL = frozenset(RUNS)
ONE_PASS = frozenset({"12", "64"})
PAST = frozenset({"64 cached", "64 from 8"})
CACHED = PAST | {"12 cached"}


@dataclass(frozen=True)
class Finding:
    """What a peer was seen to compute instead.

    Attributes:
        runs: in which it differs; seen in others, or in fewer, it is not the same finding.
        brief: in a few words.
        what: in a sentence.
        instead: our model with that change, or the name of a numerics profile, to hold the peer against; None if the
            runs alone are the evidence.
    """

    runs: frozenset[str]
    brief: str
    what: str
    instead: Change | str | None


@dataclass(frozen=True)
class Peer:
    """One implementation at one version, by its recipe in `peers.py` with these options."""

    name: str
    recipe: str
    requires: tuple[str, ...]
    options: tuple[str, ...] = ()
    model: str = "4 layers"
    dtypes: tuple[str, ...] = DTYPES
    finding: Finding | None = None
    numerics: str | None = None  # a profile that explains what is left in a narrow dtype
    refuses: bool = False  # whether it is known to refuse this model; another that does not build it was not run
    folder: str = ""  # that it is installed in, if its first requirement's would be another peer's

    @property
    def environment(self) -> str:
        return self.folder or self.requires[0].replace("==", "-")


def transformers(number: str, attention: str = "eager", finding: Finding | None = None, refuses: bool = False) -> Peer:
    more: tuple[str, ...] = ("numpy<2",) if number in ("4.42.3", "4.42.4", "4.48.0") else ()
    if number == "5.23.0":
        more = ("gguf==0.19.0", "accelerate==1.15.0", "protobuf==7.36.2")
    name = f"transformers {number}, {attention}"
    requires, options = (f"transformers=={number}", *more), [f"attention={attention}"]
    if attention.startswith("default"):  # "default (sdpa)": it must be what is chosen where nothing is asked for
        options = ["attention=default", f"chosen={attention[9:-1]}"]
    return Peer(name, "transformers", requires, tuple(options), finding=finding, refuses=refuses)


UNCAPPED = Finding(ALL, "no cap on attention scores", "Scores are not capped.", without_score_cap)
EARLY_SHIFT = Finding(
    frozenset({"64 from 8"}),
    "where decoding fills the window, a key is lost early and an empty slot is seen",
    "As published in one pass. Where decoding fills the window of its HybridCache, local layers lose a key one step "
    "early and see an empty slot of zeros in its place, until one window later.",
    with_cache(early_shift),
)
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
TABLE_GELU = Finding(
    ALL,
    "as published, with GELU from a table of 16-bit numbers",
    "Gemma 2 in llama.cpp's arithmetic, which takes GELU from a table of 16-bit numbers.",
    "llama.cpp",
)
PEERS = [
    transformers("5.23.0"),
    transformers("5.23.0", "default (eager)"),
    transformers("5.23.0", "sdpa", refuses=True),
    transformers("5.23.0", "flex_attention"),
    transformers("5.20.2", "default (sdpa)", UNCAPPED),
    transformers("4.57.1"),
    transformers("4.57.1", "default (sdpa)", UNCAPPED),
    transformers("4.51.3", finding=EARLY_SHIFT),
    transformers(
        "4.48.0",
        finding=Finding(
            PAST,
            "as published, as far as it runs",
            "As published in one pass. With its HybridCache, no decoding past the window.",
            None,
        ),
    ),
    transformers(
        "4.48.0",
        "sdpa",
        finding=Finding(
            ALL,
            "no cap on attention scores",
            "Scores are not capped. With its HybridCache, no decoding past the window.",
            without_score_cap,
        ),
    ),
    transformers("4.42.4", finding=EARLY_SHIFT),
    transformers(
        "4.42.3",
        finding=Finding(
            LONG,
            "local and global layers swapped",
            "Local and global layers are swapped, and no decoding past the window.",
            swapped,
        ),
    ),
    Peer(
        "transformers 5.23.0, a GGUF of 46 layers",
        "transformers",
        transformers("5.23.0").requires,
        ("gguf=model.gguf",),
        "46 layers",
        finding=Finding(
            ALL,
            "query scale 256^-0.5, where the model's is another (here 18^-0.5, in 27B 144^-0.5)",
            "The query scale is 256^-0.5, where this model's is 18^-0.5.",
            changed(query_pre_attn_scalar=256),
        ),
    ),
    Peer(
        "llama.cpp in llama-cpp-python 0.3.36",
        "llama.cpp",
        LLAMA_CPP,
        (),
        "4 layers, query scale 16",
        ("float32",),
        TABLE_GELU,
    ),
    Peer(
        "llama.cpp in llama-cpp-python 0.3.36, 46 layers",
        "llama.cpp",
        LLAMA_CPP,
        (),
        "46 layers",
        ("float32",),
        TABLE_GELU,
    ),
    Peer(
        "TransformerLens 4.3.0, TransformerBridge on transformers 5.24.0",
        "transformer_bridge",
        ("transformer-lens==4.3.0", "transformers==5.24.0"),
        finding=Finding(
            CACHED,
            "with a cache, nothing that was fed before is seen",
            "As published in one pass. With the cache that it hands out, a query sees no keys but those of its own "
            "chunk: decoding one at a time, a token sees only itself.",
            with_cache(own_chunk),
        ),
    ),
    Peer(
        "TransformerLens 4.3.0, TransformerBridge on transformers 5.23.0",
        "transformer_bridge",
        ("transformer-lens==4.3.0", "transformers==5.23.0"),
        folder="transformer-lens-4.3.0-transformers-5.23.0",
    ),
    Peer(
        "TransformerLens 3.9.0, HookedTransformer",  # the last version that has it
        "transformer_lens",
        ("transformer-lens==3.9.0", "transformers==5.24.0"),
    ),
    Peer(
        "TransformerLens 2.16.1, HookedTransformer",
        "transformer_lens",
        ("transformer-lens==2.16.1", "datasets==2.21.0", "pyarrow==17.0.0"),
        finding=Finding(LONG, "local and global layers swapped", "Local and global layers are swapped.", swapped),
    ),
    Peer(
        "litgpt 0.5.13, as its generate() calls it",
        "litgpt",
        ("litgpt==0.5.13",),
        ("ends=yes",),
        finding=Finding(
            CACHED,
            "with its cache, later keys of the prefill are seen",
            "As published in one pass. With its cache, nothing in it is hidden: the mask adds 1 to capped scores of "
            "what should be seen, and 0 to those of later keys in the same chunk, so that a prefill sees its own "
            "future. No prefill longer than the window.",
            with_cache(added_mask(empty=False)),
        ),
        numerics="litgpt",
    ),
    Peer(
        "litgpt 0.5.13",
        "litgpt",
        ("litgpt==0.5.13",),
        finding=Finding(
            CACHED,
            "with its cache, later keys of a chunk and empty slots are seen",
            "As published in one pass. With its cache, where it is given positions but not their end, nothing in it is "
            "hidden: the mask adds 1 to capped scores of what should be seen, and 0 to those of later keys in the same "
            f"chunk and, in global layers, of the empty slots (zeros; {CAPACITY} slots here). No prefill longer than "
            "the window.",
            with_cache(added_mask(empty=True)),
        ),
        numerics="litgpt",
    ),
    Peer(
        "torchtune 0.6.1",
        "torchtune",
        ("torchtune==0.6.1", "torchao==0.14.1"),
        finding=Finding(
            ALL,
            "score cap 30; the other cap on the hidden state, not on logits; norms around the MLP swapped; decoding "
            "sees the first keys, not the last",
            "Scores are capped at 30, a cap of 50 is on what the head reads instead of on the logits, and the norms "
            "before and after the MLP have each other's weights. With its cache, local layers count the window from a "
            "query's row in its chunk: decoding one at a time, each token sees the first keys, as many as the window.",
            as_torchtune,
        ),
    ),
    Peer(
        "nnsight 0.8.1",
        "nnsight",
        ("nnsight==0.8.1", "transformers==5.24.0", "sentencepiece==0.2.3", "protobuf==7.36.2", "tiktoken"),
    ),
    Peer(
        "google-deepmind/gemma 3.3.0",
        "deepmind",
        tuple(GEMMA.split()),
        finding=Finding(
            ONE_PASS,
            "as published in XLA's arithmetic: a coarser tanh, and 1 + w in the weights' dtype",
            "Gemma 2 in XLA's arithmetic: tanh is up to 4.3 ulp off, which shows in float32 where logits are capped, "
            "and 1 + w is rounded to the weights' dtype, which shows in bfloat16.",
            "jax",
        ),
        numerics="jax",
    ),
]
