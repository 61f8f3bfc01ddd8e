"""Other systems to compare this model with, one file each. Each is a `Reference` and imports its own package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile, ContextOverflow
from gemma2.numerics.changes import Storage

SPECS = (
    "transformers, llama.cpp, gemma_pytorch:FOLDER, trace:FILE, FILE.safetensors, FILE.jsonl, maxtext:FILE:N, "
    "self:model=MODEL2, self:KEY=VALUE,..."
)
# Two models that differ in one of these have no site in common. Any other number may differ: that is what comparing is
# for.
SHAPE = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class CannotDo(RuntimeError):
    """A reference cannot do what was asked of it; the message says why, for people."""


class Reference(Protocol):
    """Another system with the same weights.

    Attributes:
        system: who computes, with version and what matters, as "transformers 5.23.0 eager".
        dtype: in which it computes (the narrowest that matters: float32 for llama.cpp on quantized weights).
        config: the model as this system sees it.
        versions: of what else matters, name -> version.
        sites: names of `research/sites.py` that it can show.
        longest: most token ids it takes, or None.
        storage: how it holds the weights, where its arithmetic depends on it and it says so; else None.
    """

    system: str
    dtype: torch.dtype
    config: Gemma2Config
    versions: Mapping[str, str]
    sites: frozenset[str]
    longest: int | None
    storage: Storage | None

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        """One pass over one row: site -> value without the batch axis, on the CPU. A site that it shows only for the
        last positions may have fewer positions than token ids. Raises CannotDo for a site that is not among its own."""

    def with_window(self, window: int) -> Reference:
        """The same with another sliding window, so that a short prompt leaves it. Raises CannotDo."""

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        """Logits [t v] with the system's own cache, fed in chunks of these lengths (they sum to t). Raises CannotDo."""

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [t v] of every row, computed in one ragged batch as the system does it. Raises CannotDo."""


def open_reference(spec: str, path: Path, dtype: torch.dtype | None = None) -> Reference:
    """Another system with the weights of a checkpoint, or a trace of it.

    Args:
        spec: `transformers`; `llama.cpp`; `gemma_pytorch:FOLDER` with the folder of its source, whose code is run;
            `trace:FILE` or a name ending in .safetensors; `maxtext:FILE`, with `:N` for line N, or a name ending in
            .jsonl; `self`, or `self:` and any of model= (another checkpoint, say
            a modified copy), dtype=, device= and numerics=, separated by commas.
        path: the checkpoint, a local folder or file.
        dtype: to compute in, where the system leaves a choice; default the checkpoint's own.
    Raises:
        ImportError: the system is not installed; says which extra has it.
        BadModelFile: the checkpoint, the trace or the folder is not what it must be, or of another model.
        CannotDo: the system does not compute in this dtype, or has no place for a number of the config.
        ValueError: a spec that names no reference.
    """
    # Each file imports a package that may be missing, so it is imported only when it is asked for.
    kind, _, rest = spec.partition(":")
    opened = open_local(path)
    reference: Reference
    if kind == "self":
        from gemma2.parity.references.ourselves import open_ourselves

        reference = open_ourselves(rest, opened, dtype)
    elif spec.endswith(".safetensors") or (kind == "trace" and rest):
        from gemma2.parity.references.trace import Recorded

        reference = Recorded(Path(spec.removeprefix("trace:")))
    elif spec.startswith("maxtext:") or spec.endswith(".jsonl"):
        from gemma2.parity.references.maxtext import open_maxtext

        reference = open_maxtext(spec, opened.config, dtype)
    elif spec == "transformers":
        from gemma2.parity.references.transformers import Transformers

        reference = Transformers(opened, dtype or opened.weights.dtype)
    elif spec == "llama.cpp":
        from gemma2.parity.references.llama_cpp import LlamaCpp

        reference = LlamaCpp(opened, dtype or opened.weights.dtype)
    elif kind == "gemma_pytorch" and rest:
        from gemma2.parity.references.gemma_pytorch import GemmaPyTorch

        reference = GemmaPyTorch(Path(rest), opened, dtype or opened.weights.dtype)
    elif spec.endswith(".json"):
        raise ValueError(f"{spec}: a pack stands in MODEL's place: gemma2 parity {spec} --against self:model={path}")
    else:
        cure = f"; to compare with this checkpoint give self:model={spec}" if Path(spec).exists() else ""
        raise ValueError(f"no reference {spec!r}; there are {SPECS}{cure}")
    for name in SHAPE:
        theirs, ours = getattr(reference.config, name), getattr(opened.config, name)
        if theirs != ours:
            raise BadModelFile(f"{spec}: another model than {path}: its {name} is {theirs}, not {ours}")
    return reference


def open_local(path: Path) -> Checkpoint:
    """Raises BadModelFile where there is none."""
    if not path.exists():
        raise BadModelFile(f"{path}: no such file or folder")
    return open_checkpoint(path)


def parse_row(reference: Reference, ids: Sequence[int]) -> Tensor:
    """Token ids as [1 t]. Raises ContextOverflow for more than the reference takes, ValueError for one outside its
    vocabulary."""
    vocab = reference.config.vocab_size
    if not len(ids):
        raise ValueError("a pass needs at least one token id")
    for place, number in enumerate(ids):  # before they are a tensor, which holds none beyond int64
        if not 0 <= number < vocab:
            raise ValueError(f"token id {number} at {place} is outside the vocabulary [0, {vocab})")
    if reference.longest is not None and len(ids) > reference.longest:
        raise ContextOverflow(f"{reference.system} takes at most {reference.longest} token ids, not {len(ids)}")
    return torch.tensor([list(ids)], dtype=torch.int64, device="cpu")


def parse_sites(reference: Reference, sites: Iterable[str]) -> list[str]:
    """Raises CannotDo for one that the reference does not show."""
    wanted = list(sites)
    for name in wanted:
        if name not in reference.sites:
            raise CannotDo(f"{reference.system} does not show {name}")
    return wanted


def spans(ids: Sequence[int], chunks: Sequence[int]) -> list[tuple[int, int]]:
    """Where each chunk begins and ends. Raises ValueError unless they are the whole row."""
    if sum(chunks) != len(ids) or min(chunks, default=0) < 1:
        raise ValueError(f"chunks {list(chunks)} do not add up to {len(ids)} token ids, or one of them is empty")
    ends = [sum(chunks[: n + 1]) for n in range(len(chunks))]
    return list(zip([0, *ends], ends, strict=False))
