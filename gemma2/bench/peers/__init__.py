"""The systems that are measured, one file each. Each is a `Runner` and imports its own package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Runner(Protocol):
    """A system with weights loaded, in a process of its own.

    Attributes:
        versions: of what matters to its speed, name -> version.
        notes: a line for everything that it chose by itself.
        weights: bytes of its weights, each of which a decode step reads once.
        cache_bytes: bytes of a key or a value in its cache.
    """

    versions: Mapping[str, str]
    notes: tuple[str, ...]
    weights: int
    cache_bytes: int

    def start(self, batch: int, capacity: int) -> None:
        """An empty cache with room for so many columns. The cache before it is dropped."""

    def feed(self, ids: Tensor) -> Tensor:
        """Logits [b v] after the last of the columns ids [b t], which follow what was fed before."""


def open_runner(kind: str, path: Path, options: Mapping[str, Any]) -> Runner:
    """Load a system's weights: `kind` is gemma2, transformers, llama.cpp or gemma_pytorch.

    Raises:
        ImportError: its package is not installed; says which.
        BadModelFile, ValueError, MemoryError: as the system's own loading does.
    """
    # Files that import a package that may be missing are imported only when they are asked for.
    if kind == "transformers":
        from gemma2.bench.peers.transformers import TransformersRunner

        return TransformersRunner(path, **options)
    if kind == "llama.cpp":
        from gemma2.bench.peers.llama_cpp import LlamaCppRunner

        return LlamaCppRunner(path, **options)
    if kind == "gemma_pytorch":
        from gemma2.bench.peers.gemma_pytorch import GemmaPyTorchRunner

        return GemmaPyTorchRunner(path, **options)
    from gemma2.bench.peers.ourselves import OurRunner

    return OurRunner(path, **options)


def check_installed(kind: str) -> None:
    """Import a system's package, if it is one. Raises ImportError, which names what to install."""
    if kind == "transformers":
        import gemma2.parity.references.transformers
    elif kind == "llama.cpp":
        import gemma2.bench.peers.llama_cpp  # noqa: F401
