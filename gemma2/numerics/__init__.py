"""Numerics profiles: the same model computed as another implementation computes it, rounding for rounding.

A profile is an ordered list of changes to `gemma2/model.py`, which is itself bit for bit transformers' eager model.
One profile follows no other implementation: under "batch-invariant" a row's bits do not depend on how many rows or
positions are computed with it.

    theirs = with_numerics(gemma.model, "gemma_pytorch")
    partly = with_numerics(gemma.model, "gemma_pytorch", changes=["rope_mul=float32"])
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from gemma2.checkpoints.dtypes import stored_name
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.weights import Weights
from gemma2.model import Gemma2
from gemma2.numerics.changes import Change, Storage, Stored
from gemma2.numerics.parts import in_parts
from gemma2.numerics.profiles import batch_invariant, gemma_pytorch, jax, litgpt, llama_cpp, transformers
from gemma2.twins import Make, replaced, sharing

PROFILES: dict[str, tuple[Change, ...]] = {
    "transformers": transformers.CHANGES,
    "gemma_pytorch": gemma_pytorch.CHANGES,
    "llama.cpp": llama_cpp.CHANGES,
    "jax": jax.CHANGES,
    "litgpt": litgpt.CHANGES,
    "batch-invariant": batch_invariant.CHANGES,
}


def with_numerics(
    model: Gemma2, profile: str, changes: Iterable[str] | None = None, storage: Storage | None = None
) -> Gemma2:
    """A new model with a profile's arithmetic and `model`'s own parameters; `model` and its hooks are left alone.

    Every tap of `model` has its like in the new one, under the same name.

    Args:
        profile: one of `PROFILES`.
        changes: names of the changes to apply; default all.
        storage: for `llama.cpp`, parameter name -> how it is stored; default what its dtype is called in ggml.
    Raises:
        ValueError: an unknown profile or change, or a dtype that the profile's implementation does not compute in.
    """
    new = sharing(model)
    make = twins_of(profile, changes, model.dtype, storage)
    return replaced(new, make).model


def twins_of(profile: str, changes: Iterable[str] | None, dtype: torch.dtype, storage: Storage | None = None) -> Make:
    """What makes of a model's modules their twins with a profile's arithmetic, for `replaced` or `build`.

    Args and errors as in `with_numerics`.
        dtype: of the parameters.
    """
    check_profile(profile)
    known = {change.name: change for change in PROFILES[profile]}
    wanted = list(known) if changes is None else list(changes)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{profile} has no change {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if wanted and dtype == torch.float64:
        raise ValueError(f"numerics {profile!r}: no float64 is computed there; use float32 or bfloat16")
    stored = defaultdict(lambda: Stored(stored_name(dtype)), storage or {})

    def make(path: str, module: nn.Module) -> nn.Module | None:
        twin = in_parts(path, module)
        for inner in twin.modules() if twin else ():  # attention has the cap of its scores inside
            for name, change in known.items():
                if name in wanted:
                    change.apply(path, inner, stored)
        return twin

    return make


def check_profile(name: str) -> None:
    """Raises ValueError for an unknown profile."""
    if name not in PROFILES:
        raise ValueError(f"numerics {name!r} is not one of {', '.join(PROFILES)}")


def storage_of(weights: Weights) -> Storage | None:
    """How each tensor of a GGUF is stored, on which llama.cpp's arithmetic depends; else None."""
    if not isinstance(weights, GGUFWeights):
        return None
    return {name: Stored(weights.stored(name), partial(weights.scales, name)) for name in weights.tensors}
