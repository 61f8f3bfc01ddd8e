"""The Jacobian lens: a layer's value is carried to the last layer by the average derivative, J_l = E[d h_L / d h_l].

A logit lens reads an early layer as if the later ones did nothing. This one reads it as they change it to first order,
on average over texts: lens_l(h) = unembed(J_l h). Anthropic 2026, "Verbalizable Representations Form a Global
Workspace".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.checks import check_count
from gemma2.model import Gemma2
from gemma2.research.edits import Hook, edit
from gemma2.research.fitted import FittedLens
from gemma2.research.marks import marks_of
from gemma2.research.watch import model_of, watching

SKIPPED = 16  # first positions of a text, which attend to the BOS more than to anything else


def fit_jacobian(
    model: object,
    texts: Iterable[Tensor | Sequence[int]],
    *,
    layers: Iterable[int] | None = None,
    skip: int = SKIPPED,
    progress: Callable[[int], object] = lambda row: None,
) -> FittedLens:
    """Average the Jacobian of the last layer's output over texts.

    J_l[i, j] is the mean, over positions t of all texts, of the sum over positions u >= t of d h_L[u, i] / d h_l[t, j].
    A zero is added after every layer, and one backward pass for each coordinate i gives that row for all layers at
    once: d passes a text, of which each takes about twice the time of a forward pass. At the last layer J is the
    identity. A factor on J changes nothing but what the final norm's eps does, so conventions that divide by pairs of
    positions give the same lens.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper. The more exact its dtype, the better.
        texts: several, each as token ids [b t] or as a list of ids; all longer than `skip`.
        layers: default all.
        skip: leave so many first positions t of each text out.
        progress: called with the number of rows that are done, of all texts.
    Raises:
        ValueError: no text, one that is not ids or too short, a layer that is not there.
    """
    inner = model_of(model)
    config, skip = inner.config, check_count("skip", skip)
    names = layer_sites(inner, layers)
    batches = as_batches(texts)
    for number, batch in enumerate(batches):
        if batch.shape[1] <= skip:
            raise ValueError(f"text {number} has {batch.shape[1]} tokens, and its first {skip} are skipped: give more")
    d, dtype = config.hidden_size, torch.float64 if inner.dtype == torch.float64 else torch.float32
    sums = {name: torch.zeros(d, d, dtype=dtype, device="cpu") for name in names}
    sources, done = 0, 0
    for batch in batches:
        total, leaves = _graph(inner, batch.to(inner.device), names, skip)
        for row in range(d):
            found = torch.autograd.grad(total[row], list(leaves.values()), retain_graph=row < d - 1)
            for name, gradient in zip(leaves, found, strict=True):
                sums[name][row] += gradient.cpu()
            done += 1
            progress(done)
        sources += len(batch) * (batch.shape[1] - skip)
    about = {"texts": str(sum(map(len, batches))), "positions": str(sources), "skipped": str(skip)}
    return FittedLens(
        "jacobian", {name: total / sources for name, total in sums.items()}, about=about, marks=marks_of(inner)
    )


def layer_sites(model: Gemma2, layers: Iterable[int] | None) -> list[str]:
    """`hook_resid_post` of the layers. Raises ValueError for a layer that is not there, and for none."""
    count = model.config.num_hidden_layers
    wanted = list(range(count) if layers is None else layers)
    wrong = [layer for layer in wanted if type(layer) is not int or not 0 <= layer < count]
    if wrong or not wanted:
        raise ValueError(f"layers must be some of 0 to {count - 1}, not {wrong[0] if wrong else 'none'}")
    return [f"blocks.{layer}.hook_resid_post" for layer in sorted(set(wanted))]


def last_site(model: Gemma2) -> str:
    """The last layer's output."""
    return f"blocks.{model.config.num_hidden_layers - 1}.hook_resid_post"


def as_batches(texts: Iterable[Tensor | Sequence[int]]) -> list[Tensor]:
    """Token ids [b t] of each text, of lists of ids too. Raises ValueError for none, for what are no ids, and where
    gradients cannot be."""
    if isinstance(texts, str | Tensor):
        raise ValueError("texts are several: give a list of them, as [tokens]")
    batches = []
    for number, text in enumerate(texts):
        if isinstance(text, Tensor):
            ids = text
        elif isinstance(text, Sequence) and len(text) and all(type(one) is int for one in text):
            ids = torch.tensor([list(text)], device="cpu")
        else:
            raise ValueError(f"text {number} must be token ids, as a tensor [b t] or a list, not {str(text)[:60]!r}")
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"text {number} must be token ids [b t], not of shape {list(ids.shape)}")
        batches.append(ids)
    if not batches:
        raise ValueError("there is no text to fit the lens on")
    if torch.is_inference_mode_enabled():
        raise ValueError("a lens is fitted with gradients, which torch.inference_mode() leaves out: call this outside")
    return batches


def _graph(model: Gemma2, tokens: Tensor, names: list[str], skip: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The last layer's output, summed over positions: [d]; and the zeros that were added to the sites: each [d]."""
    leaves, outputs = dict[str, Tensor](), list[Tensor]()

    def add_zero(value: Tensor, hook: Hook) -> Tensor:
        wide = ops.upcast(value)
        leaf = leaves[hook.name] = torch.zeros_like(wide[0, 0]).requires_grad_()
        counted = (torch.arange(value.shape[1], device=value.device) >= skip).to(wide.dtype)
        return value + (counted[:, None] * leaf).to(value.dtype)

    keep = watching(model, lambda name, value: outputs.append(value), last_site(model))
    with torch.enable_grad(), edit(model, dict.fromkeys(names, add_zero)), keep:
        model.model(tokens)
        return ops.upcast(outputs[0]).sum(dim=(0, 1)), leaves
