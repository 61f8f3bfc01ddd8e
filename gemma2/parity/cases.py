"""The cases that catch real bugs and that a short prompt in one pass does not: windows, caches, chunks, ragged batches,
magnitudes, scales and the order of layers. A case that a system cannot run says why, and counts for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.config import GLOBAL, LOCAL
from gemma2.parity.compare import MASKED, compare, first_to_part
from gemma2.parity.references import CannotDo, Reference
from gemma2.parity.references.ourselves import Ourselves

AGREES, DIFFERS, NOT_RUN = "agrees", "differs", "not run"


@dataclass(frozen=True)
class Case:
    """What came of one case.

    Attributes:
        name: in words.
        outcome: "agrees", "differs" or "not run".
        detail: what was seen, or why it could not be.
    """

    name: str
    outcome: str
    detail: str


def run_cases(reference: Reference, ours: Ourselves, ids: Sequence[int], bos: int) -> Iterator[Case]:
    """Each case in turn, as it is done. `ours` is this model in the reference's dtype."""
    cases: dict[str, Callable[[], tuple[bool, str]]] = {
        "begins with <bos>": lambda: _begins(ids, bos),
        "prompt longer than the window": lambda: _window(reference, ours, ids),
        "layer order": lambda: _layers(reference, ids),
        "query scale": lambda: _scale(reference, ids),
        "magnitude of capped values": lambda: _caps(reference, ids),
        "cached against uncached": lambda: _cached(reference, ours, ids, [len(ids) // 2, *[1] * (-(-len(ids) // 2))]),
        "chunked prefill": lambda: _cached(reference, ours, ids, _sevens(len(ids))),
        "ragged against solo": lambda: _ragged(reference, ours, ids),
    }
    for name, case in cases.items():
        try:
            agrees, detail = case()
        except CannotDo as reason:
            yield Case(name, NOT_RUN, str(reason))
        else:
            yield Case(name, AGREES if agrees else DIFFERS, detail)


def shrunk(ids: Sequence[int]) -> int:
    """A window that the prompt leaves several times over."""
    return max(2, len(ids) // 4)


def _begins(ids: Sequence[int], bos: int) -> tuple[bool, str]:
    if ids[0] == bos:
        return True, f"the first id is {bos}"
    return False, f"the first id is {ids[0]} and not {bos}, without which Gemma 2's predictions are worthless"


def _window(reference: Reference, ours: Ourselves, ids: Sequence[int]) -> tuple[bool, str]:
    window = shrunk(ids)
    other = reference.with_window(window)
    shown = [name for name in sorted(other.sites) if name.endswith("hook_attn_scores")]
    rows = compare(ours.with_window(window).model, list(ids), other.run(ids, [*shown, *_logits(other)]))
    parting = first_to_part(rows)
    if parting is None:
        return True, f"window {window}, {len(ids)} ids"
    return False, f"window {window}: {parting.site} parts{': ' + parting.why if parting.why else ''}"


def _layers(reference: Reference, ids: Sequence[int]) -> tuple[bool, str]:
    """Which layers see only a window, from what the last query sees rather than from a config."""
    window = shrunk(ids)
    other = reference.with_window(window)
    names = [f"blocks.{i}.attn.hook_attn_scores" for i in range(reference.config.num_hidden_layers)]
    missing = [name for name in names if name not in other.sites]
    if missing:
        names = [name.replace("hook_attn_scores", "hook_pattern") for name in names]
    if not set(names) <= other.sites:
        raise CannotDo(f"{reference.system} shows neither scores nor patterns")
    seen = other.run(ids, names)
    counts = [int((seen[name][0, -1] > (0 if missing else MASKED)).sum()) for name in names]
    kinds = [LOCAL if count == window else GLOBAL if count == len(ids) else str(count) for count in counts]
    wanted = list(reference.config.layer_types)
    if kinds == wanted:
        return True, f"the last query sees {counts[0]} keys in layer 0, {counts[-1]} in the last"
    wrong = next(i for i, (found, expected) in enumerate(zip(kinds, wanted, strict=True)) if found != expected)
    return False, f"layer {wrong} sees {counts[wrong]} of {len(ids)} keys with window {window}, and is {wanted[wrong]}"


def _scale(reference: Reference, ids: Sequence[int]) -> tuple[bool, str]:
    """The factor between q·k and the raw scores, measured in block 0."""
    names = [f"blocks.0.attn.{name}" for name in ("hook_rot_q", "hook_rot_k", "hook_scores_raw")]
    config = reference.config
    wanted = config.query_pre_attn_scalar**-0.5
    if not set(names) <= reference.sites:
        raise CannotDo(f"{reference.system} does not show queries, keys and scores (it states {wanted:.6g})")
    seen = reference.run(ids, names)
    q, k, scores = (seen[name].double() for name in names)
    k = k.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
    products = torch.einsum("thc,shc->hts", q, k)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    products, scores = products[:, causal], scores[:, causal]
    measured = ((products * scores).sum() / products.square().sum()).item()
    detail = f"scores are q·k times {measured:.6g}; {config.query_pre_attn_scalar:g} ** -0.5 is {wanted:.6g}"
    return abs(measured / wanted - 1) < 1e-3, detail


def _caps(reference: Reference, ids: Sequence[int]) -> tuple[bool, str]:
    config = reference.config
    seen = reference.run(ids, _logits(reference))
    largest = seen["logits"].abs().max().item()
    detail, fine = f"|logits| up to {largest:.4g} of {config.final_logit_softcapping:g}", True
    scores = "blocks.0.attn.hook_attn_scores"
    if scores in reference.sites:
        value = reference.run(ids, [scores])[scores]
        highest = value[value > MASKED].abs().max().item()
        detail += f", |scores| of block 0 up to {highest:.4g} of {config.attn_logit_softcapping:g}"
        fine = highest <= config.attn_logit_softcapping * 1.001
    return fine and largest <= config.final_logit_softcapping * 1.001, detail


def _cached(reference: Reference, ours: Ourselves, ids: Sequence[int], chunks: Sequence[int]) -> tuple[bool, str]:
    return _judged(ours, ids, reference.cached(ids, chunks), f"{len(chunks)} passes")


def _ragged(reference: Reference, ours: Ourselves, ids: Sequence[int]) -> tuple[bool, str]:
    rows = [list(ids), list(ids[: max(1, len(ids) // 3)]), list(ids[: max(1, 2 * len(ids) // 3)])]
    for row, logits in zip(rows, reference.batched(rows), strict=True):
        fine, detail = _judged(ours, row, logits, f"rows of {', '.join(str(len(r)) for r in rows)}")
        if not fine:
            return False, f"{detail}, in the row of {len(row)}"
    return True, detail


def _judged(ours: Ourselves, ids: Sequence[int], logits: Tensor, what: str) -> tuple[bool, str]:
    (row,) = compare(ours.model, list(ids), {"logits": logits})
    return not row.parts, f"{what}: logits {row.relative:.2e} from the truth, ours {row.own_relative:.2e}"


def _sevens(length: int) -> list[int]:
    return [7] * (length // 7) + ([length % 7] if length % 7 else [])


def _logits(reference: Reference) -> list[str]:
    if "logits" not in reference.sites:
        raise CannotDo(f"{reference.system} shows no logits")
    return ["logits"]
