"""Site by site, how far another system is from the truth, and whether rounding can take it there.

The truth is this model in float64. The baseline is this model in the other system's dtype: its distance to the truth
is what rounding costs. A correct implementation in that dtype has about the same error, whatever the order of its sums.
An implementation with a larger error computes something else.

Errors are judged site by site and do not add up. The float64 model runs once more; at each site that the other system
recorded, our value is replaced by theirs before the pass goes on. A site's error is then only what the other system did
since the site before it, so a mistake shows where it is made and nowhere downstream. A site that a system does not
record is judged together with the next one that it does; of logits alone, the whole model is one site.

Two sizes are judged, since a mistake can hide in either: the size of the error, and the size of what all tokens have in
common (a gain for each channel). Rounding has no such gain: over t tokens its average shrinks by sqrt(t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.model import Gemma2
from gemma2.research import capture
from gemma2.research.sites import sites

# Times the baseline's error; docs/parity.md has the table of what these let through and what they find.
SIZE_FACTOR, GAIN_FACTOR = 2.0, 3.5
MASKED = -1e3  # a score below it is one that the softmax never sees; the caps keep real ones within +-50
# The least error that rounding is taken to leave: half the most that one rounding leaves (rms, relative: u / sqrt(3)).
# In float64 the baseline is the truth itself and its error is 0: there it is what long sums in another order leave.
FLOOR = {
    dtype: unit / math.sqrt(12)
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11))
} | {torch.float64: 2.0**-49}
CHANCE = 4.0  # the baseline's error over n values may be small by chance: it counts 1 + CHANCE / sqrt(n) times
SCORES = "hook_attn_scores"
FEWEST = 8  # channels

Values = Mapping[str, Tensor]  # site -> value without the batch axis


@dataclass(frozen=True)
class Row:
    """One site.

    Attributes:
        largest, relative, cosine: the whole distance to the truth, all that came before included: of |other - truth|;
            rms of other - truth by the rms of the truth; between the two.
        own_relative: the same of the baseline.
        size, gain: the error made at this site: its rms by the truth's rms, and the gain that all tokens share.
        own_size, own_gain: the same of the baseline.
        bitwise: whether every bit equals the baseline's.
        why: what is wrong beyond size: other keys are masked, or values are not finite, and whose; else empty.
    """

    site: str
    largest: float
    relative: float
    own_relative: float
    cosine: float
    size: float
    own_size: float
    gain: float
    own_gain: float
    bitwise: bool
    why: str = ""

    @property
    def ratio(self) -> float:
        """How many times the error that rounding explains: above 1 it is something else."""
        by_size = self.size / self.own_size / SIZE_FACTOR
        return math.inf if self.why else max(by_size, self.gain / self.own_gain / GAIN_FACTOR)

    @property
    def differs(self) -> bool:
        """Whether the error made here is larger than rounding."""
        return not self.ratio <= 1


@dataclass(frozen=True)
class LogitsRow:
    """What the difference means for predictions.

    Attributes:
        kl_mean, kl_largest: Kullback-Leibler divergence from the truth's distribution over positions, in nats.
        flips: how many of the `positions` have another most likely token.
        margin: the largest gap at those between the truth's two most likely logits; None where there are none.
        largest: |logit| of the other system.
    """

    kl_mean: float
    kl_largest: float
    flips: int
    positions: int
    margin: float | None
    largest: float


def compare(
    model: Gemma2, ids: list[int], other: Values, theirs: Gemma2 | None = None, truth: Values | None = None
) -> list[Row]:
    """A row for every site of `other`, in the order of computation.

    Args:
        model: ours, in the dtype that the other system computes in; it is the baseline, and in float64 the truth.
        ids: token ids of one row.
        other: what the other system computed.
        theirs: the baseline where it is not `model`: the same with a numerics profile.
        truth: `predicted(model, ids)`, where the caller has it already.
    Raises:
        ValueError: a value of another shape than the site's. Fewer positions than ids are taken as the last ones.
    """
    _check_shapes(model, len(ids), other)
    own = observed(theirs or model, ids, [name for name in sites(model.config) if name in other])
    truth = predicted(model, ids) if truth is None else truth
    # Of what the other shows for its last positions alone, nothing is put in the place of ours, on either side.
    whole = {name: value for name, value in own.items() if value.shape == other[name].shape}
    from_own, from_other = predicted(model, ids, whole), predicted(model, ids, other)
    floor = FLOOR[model.dtype]
    return [_row(name, truth[name], own[name], other[name], from_own[name], from_other[name], floor) for name in own]


def compare_end(truth: Tensor, own: Tensor, other: Tensor) -> Row:
    """A row for logits [t v] alone, with no site before them: the whole model is judged as one site.

    Args:
        truth: in float64; `own`: the baseline, in the dtype of the model.
    """
    return _row("logits", truth, own, other, truth, truth, FLOOR[own.dtype])


@torch.no_grad()
def predicted(model: Gemma2, ids: list[int], given: Values | None = None) -> dict[str, Tensor]:
    """Every site in float64 as it follows from the values `given` for the sites before it, and else from our own;
    without the batch axis."""
    by_module: dict[str, list[str]] = {}
    for name, site in sites(model.config).items():
        by_module.setdefault(site.module, []).append(name)
    seen: dict[str, Tensor] = {}

    def hook(names: list[str]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def put(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            stated = None
            for name in names:
                seen[name] = output[0].cpu()
                if given and name in given and given[name].shape == output.shape[1:]:
                    stated = given[name].to(output.device, torch.float64)[None]
            return stated

        return put

    with ExitStack() as hooks, in_dtype(model, torch.float64):
        for path, names in by_module.items():
            hooks.callback(model.get_submodule(path).register_forward_hook(hook(names)).remove)
        model(_tokens(model, ids))
    return seen


@torch.no_grad()
def observed(model: Gemma2, ids: list[int], names: Iterable[str]) -> dict[str, Tensor]:
    """What the model itself computes at some sites, without the batch axis."""
    wanted = list(names)
    with capture(model, wanted) as seen:
        model(_tokens(model, ids))
    return {name: seen[name][0].cpu() for name in wanted}


def _tokens(model: Gemma2, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=model.device)


@contextmanager
def in_dtype(model: Gemma2, dtype: torch.dtype) -> Iterator[None]:
    """The model computes in this dtype inside: each module's weights are converted while it runs, one module at a time,
    so that even a large model needs no second copy of itself."""
    stored: dict[nn.Module, dict[str, Any]] = {}

    def convert(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for owner in _owners(module, inputs):
            stored[owner] = {name: weight for name, weight in owner._parameters.items() if weight is not None}
            for name, weight in stored[owner].items():
                owner._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    def restore(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for owner in _owners(module, inputs):
            owner._parameters.update(stored.pop(owner, {}))

    with ExitStack() as hooks:
        try:
            for module in model.modules():
                if module._parameters or module is model.lm_head:
                    hooks.callback(module.register_forward_pre_hook(convert).remove)
                    hooks.callback(module.register_forward_hook(restore).remove)
            yield
        finally:  # after an error, else the model would stay half converted
            for module, parameters in stored.items():
                module._parameters.update(parameters)


def _owners(module: nn.Module, inputs: tuple[Any, ...]) -> list[nn.Module]:
    """Modules whose parameters `module` computes with: its own, and those it is given, as the head the embedding."""
    return [module, *(x for x in inputs if isinstance(x, nn.Module))]


def _check_shapes(model: Gemma2, t: int, other: Values) -> None:
    known = sites(model.config)
    for name, value in other.items():
        if name not in known:
            raise ValueError(f"{name} is no site of this model")
        wanted = known[name].sizes(model.config, t)[1:]
        last = (value.shape[0], *wanted[1:]) if value.ndim == 2 and 1 <= value.shape[0] <= t else wanted
        if tuple(value.shape) not in (wanted, last):
            raise ValueError(f"{name} is {list(value.shape)}, and this model's is {list(wanted)}")


def _row(
    name: str, truth: Tensor, own: Tensor, other: Tensor, from_own: Tensor, from_other: Tensor, floor: float
) -> Row:
    count = other.shape[0] if other.ndim == 2 else None
    if count is not None:  # perhaps the last positions alone
        truth, own, from_own, from_other = (x[-count:] for x in (truth, own, from_own, from_other))
    truth, own, other, from_own, from_other = (x.cpu().double() for x in (truth, own, other, from_own, from_other))
    why = "; ".join(filter(None, (_not_finite("ours", own, name), _not_finite("theirs", other, name))))
    if name.endswith(SCORES) and not why:
        # Masked scores may be any number, but both systems must mask the same keys.
        masked = truth < MASKED
        if not torch.equal(masked, other < MASKED):
            why = f"{int((masked ^ (other < MASKED)).sum())} keys seen by one system alone"
        truth, own, other, from_own, from_other = (
            x.masked_fill(masked | (x < MASKED), 0.0) for x in (truth, own, other, from_own, from_other)
        )
    error, own_error = other - from_other, own - from_own
    # Where the baseline happens to be exact, the floor stands for what rounding usually leaves.
    own_size = max(_relative(own_error, from_own), floor) * (1 + CHANCE / math.sqrt(truth.numel()))
    by_chance = own_size / math.sqrt(truth.numel() // truth.shape[-1])
    return Row(
        name,
        (other - truth).abs().max().item(),
        _relative(other - truth, truth),
        _relative(own - truth, truth),
        F.cosine_similarity(other.flatten(), truth.flatten(), dim=0).item(),
        _relative(error, from_other),
        own_size,
        _gain(error, from_other),
        max(_gain(own_error, from_own), by_chance),
        torch.equal(own, other),
        why,
    )


def _not_finite(whose: str, value: Tensor, name: str) -> str:
    """Where a value first is not finite, in words; a masked score may be minus infinity."""
    wrong = ~value.isfinite()
    if name.endswith(SCORES):
        wrong &= value != -math.inf
    return f"{whose} not finite: {value[wrong][0].item()} at {wrong.nonzero()[0].tolist()}" if wrong.any() else ""


def _relative(error: Tensor, of: Tensor) -> float:
    return error.square().mean().sqrt().item() / (of.square().mean().sqrt().item() or 1.0)


def _gain(error: Tensor, of: Tensor) -> float:
    """Least-squares gain of the error on the value in each channel (last axis): rms, channels weighted by power. Of few
    channels it is left to chance, and 0 is given."""
    if of.shape[-1] < FEWEST:
        return 0.0
    error, of = error.reshape(-1, error.shape[-1]), of.reshape(-1, of.shape[-1])
    power = of.square().sum(0)
    gains = (error * of).sum(0) / power.clamp_min(power.max() * 1e-12 + 1e-300)
    return math.sqrt(((gains.square() * power).sum() / power.sum().clamp_min(1e-300)).item())


def compare_logits(truth: Tensor, other: Tensor) -> LogitsRow:
    """What the distance of logits [t v] does to predictions; the last positions where `other` has fewer."""
    truth, other = truth[-len(other) :].double(), other.double()
    expected, found = truth.log_softmax(-1), other.log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).clamp_min(0)
    best = truth.topk(2, dim=-1)
    flipped = best.indices[:, 0] != other.argmax(-1)
    gaps = (best.values[:, 0] - best.values[:, 1])[flipped]
    margin = gaps.max().item() if flipped.any() else None
    largest = other.abs().max().item()
    return LogitsRow(kl.mean().item(), kl.max().item(), int(flipped.sum()), len(truth), margin, largest)


def first_difference(rows: Iterable[Row]) -> Row | None:
    """The first site, in the order of computation, at which the systems differ."""
    return next((row for row in rows if row.differs), None)
