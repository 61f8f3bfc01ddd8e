"""A text in windows, and what a model's head reads at every token of it: in memory a part at a time, or in a file."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma2.atomic import check_space
from gemma2.checks import check_count
from gemma2.config import Gemma2Config
from gemma2.gemma import Gemma
from gemma2.model import Gemma2
from gemma2.scoring import TOKENS, check_windows, hidden, windows
from gemma2.tokenizer import Tokenizer, parse_ids

Tick = Callable[[int], object]  # called with a number of tokens whenever a model has computed so many


@dataclass(frozen=True)
class Cut:
    """A text in windows.

    Attributes:
        ids: of its tokens, without the BOS.
        bos: the id that every window begins with.
        rows: of each window (start, first token that is scored, end); see `gemma2.scoring.windows`.
    """

    ids: list[int]
    bos: int
    rows: list[tuple[int, int, int]]

    @property
    def work(self) -> int:
        """Tokens that a model computes for it."""
        return sum(end - start for start, _, end in self.rows)

    @property
    def scored(self) -> list[int]:
        """How many tokens each window scores."""
        return [end - first for _, first, end in self.rows]

    @property
    def longest(self) -> int:
        """Tokens of the longest window, its BOS included."""
        return max(end - start for start, _, end in self.rows)

    @property
    def batches(self) -> list[list[tuple[int, int, int]]]:
        """The windows, some of equal length at a time."""
        many = max(1, TOKENS // self.longest)  # only a window that is alone is shorter than the others
        return [self.rows[at : at + many] for at in range(0, len(self.rows), many)]

    def tokens(self, rows: Sequence[tuple[int, int, int]], device: torch.device | str = "cpu") -> Tensor:
        """What a model reads in these windows: [b t]."""
        return torch.tensor([[self.bos, *self.ids[start : end - 1]] for start, _, end in rows], device=device)


def cut_text(
    text: str | Sequence[int],
    tokenizer: Tokenizer,
    configs: Iterable[Gemma2Config],
    *,
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> Cut:
    """A text in windows that every model holds.

    Args:
        text: text, or token ids without a BOS.
        configs: of the models.
        window: tokens that a model reads at once, the BOS among them; default: the least context of the models.
        stride: tokens by which a next window ends later than the one before; default: half of the window.
        limit: use so many of the first tokens; default: all.
    Raises:
        ValueError: no tokens, ids outside a vocabulary, wrong counts, a window beyond a model's context.
    """
    configs = list(configs)
    context = min(config.max_position_embeddings for config in configs)
    window = check_count("window", context if window is None else window, least=2)
    if window > context:
        raise ValueError(f"window {window:,} is longer than the context of a model, {context:,}: give a shorter one")
    stride = check_windows(window, stride)
    if limit is not None:
        check_count("limit", limit, least=1)
    ids = tokenizer.encode(text, bos=False) if isinstance(text, str) else text
    ids = parse_ids(ids, min(config.vocab_size for config in configs))
    if not ids:
        raise ValueError("the text has no tokens")
    ids = ids[:limit]
    return Cut(ids, tokenizer.special["bos"], list(windows(len(ids), 0, window, stride)))


def states_of(model: Gemma2, cut: Cut, tick: Tick = lambda tokens: None) -> Iterator[Tensor]:
    """What the head reads where the tokens of a text are predicted, [n d] in all: some windows at a time."""
    for rows in cut.batches:
        tokens = cut.tokens(rows, model.device)
        found, t = hidden(model, tokens), tokens.shape[1]
        yield torch.cat([row[t - (end - first) :] for row, (_, first, end) in zip(found, rows, strict=True)])
        tick(tokens.numel())


def head_of(model: Gemma2) -> Gemma2:
    """The same embedding and head as a model without layers, for `logits_in_parts`. Where another parameter is put
    into the embedding of `model` later, this one keeps what it has."""
    alone, inner, embedding = copy.copy(model), copy.copy(model.model), copy.copy(model.model.embed_tokens)
    for module in (alone, inner, embedding):
        module._modules, module._parameters = dict(module._modules), dict(module._parameters)
    alone.model, inner.embed_tokens, inner.layers = inner, embedding, nn.ModuleList()
    return alone


class Recorded:
    """What the head of a model reads at every token of a text, in a temporary file, and that head. The model itself can
    go, so that another fits into memory.

    Use it in a `with` block, whose end removes the file.

    Args:
        folder: where the file goes; default: the system's folder for temporary files.
        tick: called with a number of tokens whenever so many were computed.
    """

    def __init__(self, of: Gemma, cut: Cut, *, folder: Path | None = None, tick: Tick = lambda tokens: None) -> None:
        model, n, d = of.model, len(cut.ids), of.config.hidden_size
        self.cut, self.tokenizer, self.head = cut, of.tokenizer, head_of(model)
        self._states: Tensor | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="gemma2-states-", dir=folder, ignore_cleanup_errors=True)
        try:
            place = Path(self._folder.name)
            check_space(place, n * d * model.dtype.itemsize)
            kept = torch.from_file(str(place / "states"), shared=True, size=n * d, dtype=model.dtype).view(n, d)
            done = 0
            for states in states_of(model, cut, tick):
                kept[done : done + len(states)] = states.cpu()
                done += len(states)
            self._states = kept
        except BaseException:
            self.close()
            raise

    def states(self) -> Iterator[Tensor]:
        """The parts that `states_of` gave, from the file."""
        if self._states is None:
            raise ValueError("this recording was closed, and its file is gone")
        for part in self._states.split([sum(end - first for _, first, end in rows) for rows in self.cut.batches]):
            yield part.to(self.head.device)

    def close(self) -> None:
        """Remove the file."""
        self._states = None
        self._folder.cleanup()

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
