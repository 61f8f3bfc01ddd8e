"""A page that shows one pass over the reader's own text as a scroll: every number in it was computed."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2.config import Gemma2Config
from gemma2.errors import ContextOverflow
from gemma2.gemma import Gemma
from gemma2.pictures.explain.data import gathered
from gemma2.pictures.explain.markup import body, script, style, title
from gemma2.pictures.explain.panels import AFTER, BEFORE, in_layer
from gemma2.pictures.explain.run import compute
from gemma2.pictures.page import page
from gemma2.tokenizer import parse_ids


def explain(
    gemma: Gemma, text: str | Sequence[int], layers: Sequence[int] | None = None, *, name: str = "", foot: str = ""
) -> str:
    """A self-contained HTML page of one pass over `text`.

    Args:
        text: a text, before which BOS is put, or token ids, which are taken as they are.
        layers: those to show in full; default: the first local and the first global one.
        name: of the model, for the page's head; foot: a line below.
    Raises:
        ValueError: a layer that is not there, or no tokens; ContextOverflow for more than the model's context.
    """
    picked = chosen_layers(gemma.config, layers)
    ids = gemma.tokenizer.encode(text) if isinstance(text, str) else parse_ids(text, gemma.config.vocab_size)
    if not ids:
        raise ValueError("there are no tokens: give a text, or at least one token id")
    if len(ids) > gemma.config.max_position_embeddings:
        context = gemma.config.max_position_embeddings
        raise ContextOverflow(f"{len(ids):,} tokens exceed the model's context of {context:,}")
    run = compute(gemma.model, ids)
    full = {layer: in_layer(layer) for layer in picked}
    data = gathered(gemma.tokenizer, run, [*BEFORE, *(panel for panels in full.values() for panel in panels), *AFTER])
    shown = body(run, full, data, gemma.tokenizer, name)
    return page(title(ids, gemma.tokenizer), shown, style=style(), script=script(), foot=foot)


def chosen_layers(config: Gemma2Config, layers: Sequence[int] | None) -> list[int]:
    """The layers to show in full, in order. Raises ValueError for one that is not there, or given twice."""
    if layers is None:
        return sorted({config.layer_types.index(kind) for kind in config.layer_types})
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"there is no layer {layer!r}: this model has layers 0 to {config.num_hidden_layers - 1}")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be at least one, and none twice, not {list(layers)}")
    return sorted(layers)
