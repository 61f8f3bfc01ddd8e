"""Numerics profiles: the same model computed as another implementation computes it, rounding for rounding.

A profile is an ordered list of changes to `gemma2/model.py`, which is itself bit for bit transformers' eager model.

    theirs = with_numerics(gemma.model, "gemma_pytorch")
    partly = with_numerics(gemma.model, "gemma_pytorch", changes=["rope_mul=float32"])
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.weights import Weights
from gemma2.model import Gemma2
from gemma2.numerics.changes import Change, Kinds, Stored
from gemma2.numerics.parts import in_parts
from gemma2.numerics.profiles import gemma_pytorch, jax, litgpt, llama_cpp, transformers

PROFILES: dict[str, tuple[Change, ...]] = {
    "transformers": transformers.CHANGES,
    "gemma_pytorch": gemma_pytorch.CHANGES,
    "llama.cpp": llama_cpp.CHANGES,
    "jax": jax.CHANGES,
    "litgpt": litgpt.CHANGES,
}
GGML = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def with_numerics(
    model: Gemma2, profile: str, changes: Iterable[str] | None = None, kinds: Kinds | None = None
) -> Gemma2:
    """A new model with a profile's arithmetic and `model`'s own parameters; `model` and its hooks are left alone.

    Every tap of `model` has its like in the new one, under the same name.

    Args:
        profile: one of `PROFILES`.
        changes: names of the changes to apply; default all.
        kinds: for `llama.cpp`, parameter name -> how it is stored; default what its dtype is called in ggml.
    Raises:
        ValueError: an unknown profile or change, or a dtype that the profile's implementation does not compute in.
    """
    check_profile(profile)
    known = {change.name: change for change in PROFILES[profile]}
    wanted = list(known) if changes is None else list(changes)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{profile} has no change {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    if wanted and model.model.embed_tokens.weight.dtype == torch.float64:
        raise ValueError(f"numerics {profile!r}: no float64 is computed there; use float32 or bfloat16")
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        twin = Gemma2(model.config)
    twin.load_state_dict(parameters, strict=True, assign=True)
    twin.train(model.training)
    types = {name: Stored(GGML.get(tensor.dtype, "F32")) for name, tensor in parameters.items()} | dict(kinds or {})
    in_parts(twin)
    for name, change in known.items():
        if name in wanted:
            change.apply(twin, types)
    return twin


def check_profile(name: str) -> None:
    """Raises ValueError for one that there is not."""
    if name not in PROFILES:
        raise ValueError(f"numerics {name!r} is not one of {', '.join(PROFILES)}")


def stored_kinds(weights: Weights) -> Kinds | None:
    """How each tensor of a GGUF is stored, on which llama.cpp's arithmetic depends; else None."""
    if not isinstance(weights, GGUFWeights):
        return None
    return {name: Stored(weights.stored(name), partial(weights.scales, name)) for name in weights.tensors}
