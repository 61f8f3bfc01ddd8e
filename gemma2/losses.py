"""Cross-entropy of the model's own logits, cap included, in which the logits of a text are never held.

At 2,048 tokens and 256,000 pieces the logits alone are 2 GB in float32, and the plain loss has four such at its peak.
`cross_entropy` computes them for a slice of the vocabulary at a time, in both directions. It keeps one number a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gemma2.head import inside, is_plain, slices, wide
from gemma2.model import Gemma2
from gemma2.ops import upcast
from gemma2.tied import check_same_device
from gemma2.tokens import first_true

IGNORED = -100  # PyTorch's and transformers' target of a token that has no loss
REDUCTIONS = ("mean", "sum", "none")
# Logits that other modules compute at once: 64 MB in float32, and a few times that while they are worked on. A call may
# make the whole matrix anew, as a packed head does, so it gets as many rows as memory allows.
AT_ONCE_BY_MODULES = 2**24


def cross_entropy(
    model: Gemma2, states: Tensor, targets: Tensor, *, ignore_index: int = IGNORED, reduction: str = "mean"
) -> Tensor:
    """-log p(target), in nats: what `F.cross_entropy(model(tokens).flatten(0, 1).float(), ...)` is, in little memory.

        loss = cross_entropy(model, model.model(tokens), next_tokens(tokens))

    Gradients reach `states` and the embedding. Where the head, the cap and the embedding are Gemma 2's own, logits are
    made anew for the gradient by a slice of the vocabulary, and a second derivative is refused. Where one of them is
    a twin, has a hook, or is changed by an adapter, the modules themselves are called for a few tokens [1 m d] at a
    time, and once more for the gradient. Under autocast the products have its dtype, as those of the modules do.

    Args:
        states: what the head reads, [... d]: the output of `model.model`.
        targets: an id for each state, [...]; `ignore_index` where there is none.
        reduction: "mean" over the targets that count, "sum", or "none": one for each target, 0 where it is ignored.
    Returns:
        float32; float64 in a float64 model.
    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, or a mean of no target.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    _check(model, states, targets, ignore_index)
    flat, ids = states.reshape(-1, states.shape[-1]), targets.reshape(-1).long()
    kept = (ids != ignore_index).nonzero()[:, 0]
    if reduction == "mean" and not len(kept):
        raise ValueError(f"every target is {ignore_index}, which is ignored: there is nothing to take the mean of")
    some = flat if len(kept) == len(ids) else flat[kept]
    each = _by_vocabulary(model, some, ids[kept]) if is_plain(model) else _by_modules(model, some, ids[kept])
    if reduction == "none":
        return each.new_zeros(len(ids)).index_copy(0, kept, each).view(targets.shape)
    return each.sum() if reduction == "sum" else each.mean()


def next_tokens(tokens: Tensor, positions: Tensor | None = None, ignore_index: int = IGNORED) -> Tensor:
    """The target of each token, [b t]: the next one of its row; `ignore_index` for the last one and for padding."""
    targets = torch.full_like(tokens, ignore_index, dtype=torch.int64)
    targets[:, :-1] = tokens[:, 1:]
    return targets if positions is None else targets.masked_fill(positions < 0, ignore_index)


def _check(model: Gemma2, states: Tensor, targets: Tensor, ignore_index: int) -> None:
    d, vocab = model.config.hidden_size, model.config.vocab_size
    if states.ndim < 1 or states.shape[-1] != d or states.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets {list(targets.shape)} are not one for each of the states {list(states.shape)}, which must be "
            f"[... {d}], the output of model.model"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32, not {targets.dtype}")
    wrong = first_true(((targets < 0) | (targets >= vocab)) & (targets != ignore_index))
    if wrong is not None:
        raise ValueError(
            f"target {int(targets[tuple(wrong)])} at {wrong} is outside the vocabulary [0, {vocab}), and not "
            f"{ignore_index}, which is ignored"
        )


def _by_modules(model: Gemma2, states: Tensor, targets: Tensor) -> Tensor:
    """[n d] and [n] -> [n], through the head and the cap that stand in the model, a few rows at a time."""

    def some(rows: Tensor, ids: Tensor) -> Tensor:
        logits = model.softcap(model.lm_head(rows[None], model.model.embed_tokens))[0]
        return F.cross_entropy(upcast(logits), ids, reduction="none")

    rows = max(1, AT_ONCE_BY_MODULES // model.config.vocab_size)
    parts = [
        checkpoint(some, *part, use_reentrant=False)
        for part in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _by_vocabulary(model: Gemma2, states: Tensor, targets: Tensor) -> Tensor:
    """[n d] and [n] -> [n], by Gemma 2's own arithmetic, a slice of the vocabulary at a time."""
    weight, kind = model.model.embed_tokens.weight, states.device.type
    check_same_device(states, weight)
    dtype = None
    if torch.is_autocast_enabled(kind) and states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    each: Tensor = _CappedCrossEntropy.apply(states, weight, targets, model.softcap.cap, dtype)[0]
    return each


class _CappedCrossEntropy(torch.autograd.Function):
    """logsumexp(c) - c[target] for c = softcap(states @ weight^T): [n] and [n], the logsumexp.

    The slices are of the vocabulary and not of the rows, so each row of the embedding's gradient is one product over
    all n tokens: it is written once and rounded once, as that of the plain loss is. Only the gradient of the states is
    summed over slices, in float32 or wider.
    """

    @staticmethod
    def forward(
        states: Tensor, weight: Tensor, targets: Tensor, cap: float, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            total = states.new_full((len(states),), -torch.inf, dtype=wide(states))
            picked = states.new_zeros(len(states), dtype=wide(states))
            for start, rows, capped in slices(states.to(dtype or states.dtype), weight, cap):
                total = torch.logaddexp(total, capped.logsumexp(-1))
                here, at = inside(targets, start, len(rows))
                picked += torch.where(here, capped.gather(1, at)[:, 0], 0)
        return total - picked, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        states, weight, targets, ctx.cap, ctx.dtype = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(states, weight, targets, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, total = ctx.saved_tensors
        grad = grads[0]
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            x = states.to(ctx.dtype or states.dtype)
            of_states = torch.zeros_like(states, dtype=wide(states)) if ctx.needs_input_grad[0] else None
            of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            for start, rows, capped in slices(x, weight, ctx.cap):
                here, at = inside(targets, start, len(rows))
                error = (capped - total[:, None]).exp_()  # p - [target]
                error.scatter_add_(1, at, -here[:, None].to(error.dtype))
                slope = capped.div_(ctx.cap).square_().neg_().add_(1)
                of_logits = error.mul_(slope).mul_(grad[:, None]).to(x.dtype)
                if of_states is not None:
                    of_states += of_logits @ rows
                if of_weight is not None:
                    of_weight[start : start + len(rows)] = of_logits.t() @ x
        found: tuple[Tensor | None, ...] = (None if of_states is None else of_states.to(states.dtype), of_weight)
        if torch.is_grad_enabled():  # create_graph=True
            found = tuple(None if one is None else _NoSecond.apply(one, grad, states, weight) for one in found)
        return *found, None, None, None


class _NoSecond(torch.autograd.Function):
    """A gradient as it is, which has itself no gradient."""

    @staticmethod
    def forward(gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "gemma2.losses.cross_entropy has no second derivative; that of torch.nn.functional.cross_entropy over "
            "model(tokens) has one"
        )
