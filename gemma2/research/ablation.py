"""What a change of the architecture costs on a text: nats per token, KL and top tokens, with bootstrap intervals.

The text is cut into windows of `context` tokens, each with the BOS in front, and every token of the text is predicted
once. Windows are computed one after the other, in chunks of queries with a cache, and their logits in parts: what is
held in memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma2.checks import check_count
from gemma2.config import GLOBAL, LOCAL, Gemma2Config
from gemma2.model import Gemma2
from gemma2.ops import upcast
from gemma2.research.ablate import ablate
from gemma2.research.watch import model_of
from gemma2.scoring import hidden, perplexity_of

UNCHANGED = "unchanged"
PASS = 1024  # tokens of a pass: short windows are computed together
LOGITS = 2**26  # of a part
SAMPLES = 1000  # of the bootstrap
LEVEL = 0.95  # of its intervals
Switches = Mapping[str, Mapping[str, Any]]  # a change's name -> arguments of `ablate`


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and the ends of its interval; both are None for a text of one window."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Effect:
    """What one change does at one context.

    Attributes:
        nats: per token, of the changed model.
        more: nats per token above the unchanged model's; the same windows are drawn for both, so its interval is
            narrower than that of `nats`.
        kl: KL(unchanged || changed) in nats, the mean over tokens.
        top: share of the tokens at which another token is the likeliest.
        windows, tokens: of the text; tokens are those that were predicted.
    """

    name: str
    context: int
    windows: int
    tokens: int
    nats: Estimate
    more: Estimate
    kl: Estimate
    top: Estimate

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.nats.value)

    @property
    def ratio(self) -> float:
        """Of the perplexities, changed to unchanged."""
        return perplexity_of(self.more.value)


def standard(config: Gemma2Config, *, layers: bool = False, heads: bool = False) -> dict[str, dict[str, Any]]:
    """The switches that `gemma2 ablate` tries.

    Args:
        layers: one more for each layer, left out.
        heads: one more for each head, silenced.
    """
    found: dict[str, dict[str, Any]] = {
        "no score cap": {"attn_softcap": None},
        "no final cap": {"final_softcap": None},
        "neither cap": {"attn_softcap": None, "final_softcap": None},
    }
    types, width = config.layer_types, config.sliding_window
    if LOCAL in types:
        for part in (2, 4):
            if width // part:
                found[f"window {width // part:,} for {width:,}"] = {"window": width // part}
        found["all layers global"] = {"window": None}
    if GLOBAL in types:
        found["all layers local"] = {"layer_types": (LOCAL,) * len(types)}
        swapped = tuple(GLOBAL if kind == LOCAL else LOCAL for kind in types)
        found["local and global swapped"] = {"layer_types": swapped}
    found["no post-norms"] = {"post_norms": False}
    found["no embedding scale"] = {"embed_scale": False}
    if layers:
        found |= {f"without layer {i}": {"layers": [i]} for i in range(config.num_hidden_layers)}
    if heads:
        pairs = [(i, j) for i in range(config.num_hidden_layers) for j in range(config.num_attention_heads)]
        found |= {f"head {i}.{j} silent": {"heads": [(i, j)]} for i, j in pairs}
    return found


def windows(ids: Sequence[int], context: int, bos: int) -> list[list[int]]:
    """A text's ids, which have no BOS, in windows of at most `context` tokens with the BOS in front of each.

    Raises:
        ValueError: no ids, or a context of less than the BOS and a token.
    """
    check_count("context", context, least=2)
    if not ids:
        raise ValueError("the text has no tokens")
    return [[bos, *ids[start : start + context - 1]] for start in range(0, len(ids), context - 1)]


def batches(ids: Sequence[int], context: int, bos: int) -> list[Tensor]:
    """The windows of a text as tensors [b t] of equal windows, of about `PASS` tokens each."""
    found = windows(ids, context, bos)
    last = [found.pop()] if len(found) > 1 and len(found[-1]) != len(found[0]) else []
    rows = max(1, PASS // context)
    parts = [found[start : start + rows] for start in range(0, len(found), rows)] + ([last] if last else [])
    return [torch.tensor(part, device="cpu") for part in parts]


def parts(model: Gemma2, shape: torch.Size) -> Iterator[slice]:
    """Slices of positions whose logits are few enough to hold, for hidden states [b t d]."""
    step = max(1, LOGITS // (shape[0] * model.config.vocab_size))
    return (slice(start, start + step) for start in range(0, shape[1], step))


@torch.no_grad()
def measure(
    model: Any,
    ids: Sequence[int],
    switches: Switches,
    context: int,
    bos: int,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    tick: Callable[[int], object] = lambda tokens: None,
) -> list[Effect]:
    """The effect of each change on a text, the unchanged model first.

    Args:
        model: a `Gemma2` or a `Gemma`.
        ids: the text's, without a BOS.
        switches: name -> arguments of `ablate`.
        context: tokens of a window, its BOS included.
        bos: the BOS's id.
        samples, seed: of the bootstrap, which draws whole windows.
        tick: called with a number of tokens whenever so many were computed by one of the models; `work` says how many
            that is in all.
    Raises:
        ValueError: see `windows` and `ablate`.
    """
    model = model_of(model)
    check_count("samples", samples, least=1)
    check_count("seed", seed)
    if UNCHANGED in switches:
        raise ValueError(f"no change may be called {UNCHANGED!r}")
    for options in switches.values():  # refused before anything is computed
        with ablate(model, **options):
            pass
    sums: dict[str, list[Tensor]] = {name: [] for name in (UNCHANGED, *switches)}
    counts: list[int] = []
    for batch in batches(ids, context, bos):
        tokens = batch.to(model.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        counts += [targets.shape[1]] * len(tokens)
        before = hidden(model, inputs)
        whole = list(parts(model, before.shape))
        kept = likelihoods(model, before) if len(whole) == 1 else None  # few enough for all changes
        for name in sums:
            changes = switches.get(name)
            after = before if changes is None else _under(model, changes, hidden, inputs)
            total = torch.zeros(len(tokens), 3, dtype=torch.float64, device="cpu")
            for part in whole:
                plain = likelihoods(model, before[:, part]) if kept is None else kept
                changed = plain if changes is None else _under(model, changes, likelihoods, after[:, part])
                total += _compared(plain, changed, targets[:, part])
            sums[name].append(total)
            tick(inputs.numel())
    joined = {name: torch.cat(rows) for name, rows in sums.items()}
    tokens_in = torch.tensor(counts, dtype=torch.float64, device="cpu")
    return [_effect(name, context, rows, joined[UNCHANGED], tokens_in, samples, seed) for name, rows in joined.items()]


def work(ids: Sequence[int], contexts: Iterable[int], switches: Switches) -> int:
    """How many tokens all models together compute, for a progress bar."""
    return len(ids) * (len(switches) + 1) * len(list(contexts))


def likelihoods(model: Gemma2, states: Tensor) -> Tensor:
    """Log-probabilities [b t v] for what the head reads, in float32, or float64 for float64."""
    logits = model.softcap(model.lm_head(states, model.model.embed_tokens))
    return upcast(logits).log_softmax(dim=-1)


def bootstrap(sums: Tensor, tokens: Tensor, samples: int = SAMPLES, seed: int = 0) -> list[Estimate]:
    """Means per token of sums over windows [n k], with the 95 % interval of drawing n windows with replacement.

    Args:
        tokens: of each window, [n], float64.
    """
    means = (sums.sum(dim=0) / tokens.sum()).tolist()
    n = len(tokens)
    if n < 2:
        return [Estimate(value, None, None) for value in means]
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = [torch.randint(n, (n,), generator=generator, device="cpu") for _ in range(samples)]
    found = torch.stack([sums[which].sum(dim=0) / tokens[which].sum() for which in drawn])
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=found.dtype, device="cpu")
    low, high = found.quantile(ends, dim=0).tolist()
    return [Estimate(*three) for three in zip(means, low, high, strict=True)]


def _under(model: Gemma2, options: Mapping[str, Any], compute: Callable[[Gemma2, Tensor], Tensor], x: Tensor) -> Tensor:
    with ablate(model, **options):
        return compute(model, x)


def _compared(plain: Tensor, changed: Tensor, targets: Tensor) -> Tensor:
    """Sums over each row [b 3], float64 on the CPU: nats of the targets, KL, other top tokens; of log-probabilities
    [b t v]."""
    nats = -changed.gather(-1, targets[..., None])[..., 0]
    kl = (plain.exp() * (plain - changed)).sum(dim=-1)
    other = plain.argmax(dim=-1) != changed.argmax(dim=-1)
    return torch.stack([x.cpu().double().sum(dim=1) for x in (nats, kl, other)], dim=1)  # Apple's GPUs have no float64


def _effect(name: str, context: int, sums: Tensor, plain: Tensor, tokens: Tensor, samples: int, seed: int) -> Effect:
    columns = torch.cat((sums[:, :1], sums[:, :1] - plain[:, :1], sums[:, 1:]), dim=1)
    return Effect(name, context, len(tokens), int(tokens.sum()), *bootstrap(columns, tokens, samples, seed))
