"""The tuned lens: a small affine map for each layer, trained to say what the model itself says in the end.

Belrose et al. 2023, arXiv:2303.08112.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.checks import check_count, check_number
from gemma2.model import Gemma2
from gemma2.research.fitted import FittedLens
from gemma2.research.jacobian import as_batches, last_site, layer_sites
from gemma2.research.lens import unembed
from gemma2.research.marks import marks_of
from gemma2.research.seen import capture
from gemma2.research.watch import model_of


def fit_tuned(
    model: object,
    texts: Iterable[Tensor | Sequence[int]],
    *,
    layers: Iterable[int] | None = None,
    steps: int = 100,
    rate: float = 1e-3,
    positions: int = 64,
    seed: int = 0,
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> FittedLens:
    """Train a map h -> W h + b for each layer. It begins as the identity, which is the logit lens. The loss is the KL
    divergence of the lens's prediction from the model's own, with its cap, in nats and averaged over positions. The
    maps are in float32, and the model's parameters get no gradient.

    Args:
        model: a `Gemma2`, a `Gemma`, or one of them in a wrapper.
        texts: several, each as token ids [b t] or as a list of ids.
        layers: default all; the last one's map stays the identity, because there is nothing to learn.
        steps: of Adam, on the positions of one text each, in turn.
        rate: the learning rate, which falls to zero in a line.
        positions: at most so many of a text's, drawn at random: their logits are all that a step holds.
        seed: of these draws. The same seed gives the same lens.
        progress: called after each step, with its number and the mean loss of the layers.
    Raises:
        ValueError: no text, a layer that is not there, numbers that cannot be.
    """
    inner = model_of(model)
    names = layer_sites(inner, layers)
    if names == [last_site(inner)]:
        raise ValueError("the last layer alone has nothing to learn: its lens is the model")
    check_count("steps", steps, 1)
    check_count("positions", positions, 1)
    check_number("rate", rate, "above 0", lambda x: 0 < x < float("inf"))
    batches = as_batches(texts)
    d, device = inner.config.hidden_size, inner.device
    with torch.enable_grad():
        turns = {name: torch.zeros(d, d, device=device, requires_grad=True) for name in names}
        shifts = {name: torch.zeros(d, device=device, requires_grad=True) for name in names}
    trained = [name for name in names if name != last_site(inner)]
    optimizer = torch.optim.Adam([part for name in trained for part in (turns[name], shifts[name])], lr=rate)
    generator = torch.Generator("cpu").manual_seed(seed)
    for step in range(steps):
        streams, own = _observed(inner, batches[step % len(batches)].to(device), trained, positions, generator)
        losses = []
        for name, stream in streams.items():
            with torch.enable_grad():
                wide = ops.upcast(stream)
                carried = wide + wide @ turns[name].T.to(wide) + shifts[name].to(wide)
                said = ops.upcast(unembed(inner, carried.to(stream.dtype))).log_softmax(dim=-1)
                loss = (own.exp() * (own - said)).sum(dim=-1).mean()
                both = (turns[name], shifts[name])
                for parameter, gradient in zip(both, torch.autograd.grad(loss, both), strict=True):
                    parameter.grad = gradient
            losses.append(float(loss.detach()))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.step()
        progress(step, sum(losses) / len(losses))
    eye = torch.eye(d, device=device)
    weights = {name: (eye + turn.detach()).cpu() for name, turn in turns.items()}
    about = {
        "texts": str(sum(map(len, batches))),
        "steps": str(steps),
        "positions": str(positions),
        "rate": str(rate),
        "seed": str(seed),
    }
    biases = {name: shift.detach().cpu() for name, shift in shifts.items()}
    return FittedLens("tuned", weights, biases, about, marks_of(inner))


@torch.no_grad()
def _observed(
    model: Gemma2, tokens: Tensor, names: list[str], most: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """The values of the sites at some positions [1 n d], and the logarithms of the model's probabilities [1 n v]."""
    last = last_site(model)
    with capture(model, [*names, last]) as seen:
        model.model(tokens)
    drawn = torch.randperm(tokens.numel(), generator=generator)[:most].sort().values.to(tokens.device)
    streams = {name: value.flatten(0, 1)[drawn][None] for name, value in seen.items()}
    own = ops.upcast(unembed(model, streams[last])).log_softmax(dim=-1)
    return {name: streams[name] for name in names}, own
