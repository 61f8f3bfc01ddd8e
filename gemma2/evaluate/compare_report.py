"""What `gemma2 compare` found, as tables, as data for the page and the picture, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma2.evaluate.atlas import KINDS, Atlas
from gemma2.evaluate.compare import Passage, Summary
from gemma2.evaluate.costs import Speed, Stored
from gemma2.pictures.ablate_words import interval, share
from gemma2.pictures.atlas import Cell, Chart
from gemma2.pictures.compare import Point, Table, Told
from gemma2.pictures.page import readable
from gemma2.strict_json import finite
from gemma2.tokenizer import Tokenizer

# Sites that are drawn over depth.
DRAWN = (
    "hook_resid_post",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "mlp.hook_post",
    "hook_mlp_out",
)
RANKED = 12  # matrices that are listed

SIZES = (
    "model",
    "type",
    "size in bytes",
    "bits a weight",
    "perplexity",
    "x A's",
    "prompt, tokens/s",
    "decode, tokens/s",
)
DISTANCE = ("model", "KL in nats", "median", "99 %", "largest", "same top token", "RMS change of p")


@dataclass
class Measured:
    """One model, beside A or A itself.

    Attributes:
        name: as it is shown.
        source: as it was given.
        stored: all of its weights.
        speed: None where it was not timed.
        summary: None for A.
        passages: the worst.
        atlas: None where none was asked for.
    """

    name: str
    source: str
    stored: Stored
    speed: Speed | None = None
    summary: Summary | None = None
    passages: list[Passage] = field(default_factory=list)
    atlas: Atlas | None = None


def tables(a: Measured, others: Sequence[Measured]) -> list[Table]:
    """Size and perplexity of all models, A first, and how far each is from A."""
    first = others[0].summary
    perplexity = "-" if first is None else f"{first.before:.4f}"
    sizes = [_sizes(a, perplexity, "1")]
    distance = []
    for one in others:
        found = one.summary
        assert found is not None  # of each that was compared
        ratio = _ratio(found)
        sizes.append(_sizes(one, f"{found.after:.4f}", ratio))
        same = share(found.same.value) if found.same.low is None else interval(found.same, ".2%")
        numbers = (found.median, found.high, found.most)
        distance.append((one.name, interval(found.kl, ".3g"), *map(short, numbers), same, f"{found.change:.3%}"))
    return [
        Table("Size, perplexity and speed", SIZES, sizes),
        Table(f"How far each is from {a.name}", DISTANCE, distance),
    ]


def points(others: Sequence[Measured]) -> list[Point]:
    return [Point(one.name, one.stored.bits, one.summary.kl) for one in others if one.summary is not None]


def told(passage: Passage, tokenizer: Tokenizer) -> Told:
    """A passage in words. Its tokens are readable, so that spaces and newlines can be seen in the picture."""
    worst, ((a, p), (b, q)) = passage.worst, passage.top
    texts = [_text(tokenizer, id) for id in passage.ids]
    said = (
        f"Where the text has {readable(tokenizer, passage.ids[worst])} (KL {passage.kl[worst]:.3g} nats), A's "
        f"likeliest token is {readable(tokenizer, a)} ({p:.1%}) and B's is {readable(tokenizer, b)} ({q:.1%})."
    )
    about = f"Tokens {passage.start:,} to {passage.start + len(passage.ids) - 1:,}: {passage.mean:.3g} nats a token"
    return Told(about, list(zip(texts, passage.kl, strict=True)), worst, said)


def chart(one: Measured, atlas: Atlas, a: str, layers: int) -> Chart:
    """The atlas of a model as it is drawn."""
    cells = {(m.layer, m.kind): Cell(m.kl, m.error) for m in atlas.matrices if m.layer is not None}
    lines: dict[str, list[tuple[int, float]]] = {kind: [] for kind in DRAWN}
    for site in atlas.sites:
        if site.layer is not None and site.kind in lines:
            lines[site.kind].append((site.layer, site.error))
    other = f" {len(atlas.others)} parameters that are no matrices differ from A's: {', '.join(atlas.others[:3])}."
    text = (
        f"{atlas.tokens:,} tokens. With all matrices of {one.name}, {a} is {short(atlas.kl)} nats from itself; the "
        f"matrices one at a time add up to {short(sum(m.kl for m in atlas.matrices))}."
    )
    return Chart(
        name=one.name,
        text=text + (other if atlas.others else ""),
        layers=layers,
        kinds=list(KINDS),
        cells=cells,
        embedding=next(Cell(m.kl, m.error) for m in atlas.matrices if m.layer is None),
        layer_kl=[group.kl for group in atlas.layers],
        kind_kl={group.name: group.kl for group in atlas.kinds},
        ranked=ranked(atlas),
        lines=lines,
        sites=[("site", "relative error"), *((site.name, f"{site.error:.3%}") for site in atlas.sites)],
    )


def ranked(atlas: Atlas, most: int = RANKED) -> list[tuple[str, ...]]:
    """The matrices that are worth more bits, as text cells, the head first."""
    head = ("matrix", "type", "bits", "weights", "error", "KL alone", "saved by a bit", "saved a megabyte")
    lines = [
        (
            m.name.removeprefix("model.").removesuffix(".weight"),
            m.stored.type,
            f"{m.stored.bits:.3g}",
            f"{m.stored.weights:,}",
            f"{m.error:.2%}",
            short(m.kl),
            short(m.gain),
            short(m.worth),
        )
        for m in atlas.ranked[:most]
    ]
    return [head, *lines]


def groups(atlas: Atlas) -> list[tuple[str, ...]]:
    """KL of the layers and of the kinds of matrices, as text cells, the head first."""
    head = ("together", "weights", "KL in nats")
    return [head, *((group.name, f"{group.weights:,}", short(group.kl)) for group in (*atlas.layers, *atlas.kinds))]


def in_json(a: Measured, others: Sequence[Measured], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything, for programs, and the text of each passage. What is not finite becomes null: JSON has no such."""
    whole = {"a": _plain(a, tokenizer), "b": [_plain(one, tokenizer) for one in others]}
    found: dict[str, Any] = finite(whole)
    return found


def _plain(one: Measured, tokenizer: Tokenizer) -> dict[str, Any]:
    found = dataclasses.asdict(one)
    for entry in found["passages"]:
        entry["text"] = tokenizer.decode(entry["ids"])
    found["stored"] |= {"bits": one.stored.bits}
    if one.atlas is not None:
        for entry, matrix in zip(found["atlas"]["matrices"], one.atlas.matrices, strict=True):
            entry |= {"worth": matrix.worth, "bits": matrix.stored.bits}
    return found


def _sizes(one: Measured, perplexity: str, ratio: str) -> tuple[str, ...]:
    speeds = ("-", "-") if one.speed is None else (f"{one.speed.prompt:.4g}", f"{one.speed.decode:.4g}")
    stored = one.stored
    return (one.name, stored.type.lower(), f"{stored.bytes:,}", f"{stored.bits:.2f}", perplexity, ratio, *speeds)


def _ratio(found: Summary) -> str:
    """exp of the logarithm and of the ends of its interval."""
    ends = [None if end is None else math.exp(min(end, 700.0)) for end in dataclasses.astuple(found.ratio)]
    value, low, high = ends
    assert value is not None
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def short(value: float) -> str:
    """Three digits. What is less than float32's rounding is not given any."""
    return "0" if value == 0 else "< 1e-8" if abs(value) < 1e-8 else f"{value:.3g}"


def _text(tokenizer: Tokenizer, id: int) -> str:
    """A token as it stands in a text, with newlines as ⏎."""
    if id >= len(tokenizer):
        return readable(tokenizer, id)
    return tokenizer.piece(id).replace("▁", " ").replace("\n", "⏎").replace("\t", "⇥")
