"""The loop from a prompt to a continuation: prefill in chunks, decode a token at a time, stop each row on its own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from tqdm import tqdm

from gemma2.cache import HybridCache
from gemma2.chat import chat_ids
from gemma2.config import Gemma2Config
from gemma2.errors import ContextOverflow, NonFiniteError
from gemma2.model import Gemma2
from gemma2.sampling import Sampling, checked_count, choose, make_generator
from gemma2.tokenizer import Tokenizer, check_ids, check_text

PREFILL_CHUNK = 512  # positions a forward pass of the prompt takes: bounds the [b h t s] scores in memory
MAX_NEW_TOKENS = 256

Conversation = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, see `chat_ids`


@dataclass
class Stats:
    """Filled in while generating, for whoever passes one in. Seconds are wall-clock, tokens are summed over rows."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0  # from the first new token to the last
    decoded_tokens: int = 0  # tokens made in that time: all but each row's first
    finish_reasons: list[str] = field(default_factory=list)  # a row each: "stop" or "length"


def generate_ids(
    model: Gemma2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    *,
    finished: set[int] | None = None,
    chunk: int = PREFILL_CHUNK,
    progress: bool | None = None,
    stats: Stats | None = None,
) -> Iterator[list[int]]:
    """Iterate over the next id of every row, step by step. Everything is checked before this returns.

    Args:
        prompts: ids of each row, of any lengths; shorter rows are padded on the left.
        max_new_tokens: steps at most.
        finished: rows that have ended. The caller adds to it between steps; such a row costs its place in the batch
            but its further ids mean nothing. The loop ends when all rows are in it.
        chunk: positions of the prompt computed at once.
        progress: a bar on standard error for prompts longer than a chunk; None shows it on a terminal only.
    Raises:
        ContextOverflow: the longest prompt and max_new_tokens exceed the context; raised before computing.
        NonFiniteError: a row's logits are not finite.
        ValueError: no prompt, an empty prompt, ids outside the vocabulary, a wrong count.
    """
    config, sampling, stats = model.config, sampling or Sampling(), stats or Stats()
    finished = set() if finished is None else finished
    checked_count("max_new_tokens", max_new_tokens)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk!r}")
    rows = [check_ids(prompt, config.vocab_size) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("nothing to continue: a prompt needs at least one id (the BOS)")
    width = max(map(len, rows))
    if width + max_new_tokens > config.max_position_embeddings:
        raise ContextOverflow(
            f"prompt of {width} tokens and {max_new_tokens} new ones exceed the context of "
            f"{config.max_position_embeddings}"
        )
    generator = generator or make_generator(None, model.model.embed_tokens.weight.device)
    return _steps(model, rows, max_new_tokens, sampling, generator, finished, chunk, progress, stats)


@torch.no_grad()
def _steps(
    model: Gemma2,
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    finished: set[int],
    chunk: int,
    progress: bool | None,
    stats: Stats,
) -> Iterator[list[int]]:
    if max_new_tokens == 0:
        return
    config, width = model.config, max(map(len, rows))
    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    pads = torch.tensor([[width - len(row)] for row in rows], device=device)
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    cache = HybridCache(config, len(rows), width + max_new_tokens, dtype, device)
    seen = _seen(rows, config.vocab_size, device) if sampling.repetition_penalty != 1.0 else None

    clock = time.perf_counter()
    positions = torch.arange(width, device=device) - pads  # [b t], negative on padding
    logits = _prefill(model, tokens, positions, cache, chunk, progress)
    for step in range(max_new_tokens):
        if finished:
            logits = logits.index_fill(0, torch.tensor(sorted(finished), device=device), 0.0)
        _refuse_non_finite(logits, step)
        ids = choose(logits, sampling, generator, seen)
        chosen: list[int] = ids.tolist()
        now, live = time.perf_counter(), len(rows) - len(finished)
        if step == 0:
            stats.prompt_tokens, stats.prefill_seconds, clock = sum(map(len, rows)), now - clock, now
            stats.new_tokens = stats.decoded_tokens = 0
        else:
            stats.decoded_tokens += live
        stats.new_tokens, stats.decode_seconds = stats.new_tokens + live, now - clock
        yield chosen
        if len(finished) == len(rows) or step == max_new_tokens - 1:
            return
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        here = torch.full_like(pads, width + step) - pads
        logits = model.unembed(model.model(ids[:, None], here, cache)[:, -1])


def _prefill(
    model: Gemma2, tokens: Tensor, positions: Tensor, cache: HybridCache, chunk: int, progress: bool | None
) -> Tensor:
    """Feed the prompt chunk by chunk; only the last position's logits [b v] are ever computed."""
    width = tokens.shape[1]
    hidden = None
    disable = True if width <= chunk else None if progress is None else not progress
    with tqdm(total=width, desc="prompt", unit="tok", disable=disable, leave=False) as bar:
        for start in range(0, width, chunk):
            part = slice(start, min(start + chunk, width))
            hidden = model.model(tokens[:, part], positions[:, part], cache)
            bar.update(part.stop - part.start)
    assert hidden is not None
    return model.unembed(hidden[:, -1])


def _seen(rows: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """[b v] bool: the ids of each prompt, padding not among them."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
    for row, ids in enumerate(rows):
        seen[row, ids] = True
    return seen


def _refuse_non_finite(logits: Tensor, step: int) -> None:
    finite = torch.isfinite(logits).all(dim=-1)
    if not bool(finite.all()):
        row = int(finite.logical_not().nonzero()[0])
        raise NonFiniteError(f"step {step}: the logits of row {row} are not finite; generation stops here")


def checked_stops(stop: str | Sequence[str]) -> list[str]:
    """One stop string or several as a list. Raises ValueError for one that is empty or no text."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        check_text(text)
        if not text:
            raise ValueError("a stop string must not be empty")
    return stops


class Reply:
    """One row's text as it grows: holds back unfinished characters and what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop_ids, self.stop = tokenizer, stop_ids, stop
        self.finish_reason: str | None = None  # "stop" once the row has ended
        self._undecoded: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Take the next id, return the text it releases; sets finish_reason when the row ends."""
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return self.flush()
        self._undecoded.append(token)
        whole = len(self._undecoded) - self.tokenizer.pending_bytes(self._undecoded)
        self._held += self.tokenizer.decode(self._undecoded[:whole])
        del self._undecoded[:whole]
        return self._release()

    def flush(self) -> str:
        """All that was held back, once nothing more comes."""
        rest = self._held + self.tokenizer.decode(self._undecoded)
        self._held, self._undecoded = "", []
        return rest

    def _release(self) -> str:
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self.finish_reason, text = "stop", self._held[: min(found)]
            self._held, self._undecoded = "", []
            return text
        keep = max((_overlap(self._held, text) for text in self.stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class Gemma:
    """A model with its tokenizer, ready to write.

    Attributes:
        model: the `Gemma2` module: tokens [b t] -> logits [b t v].
        tokenizer: text to ids and back.
        chat_tuned: whether the checkpoint says it was tuned for chat; None when it says nothing.
        notes: a line for everything that the checkpoint does not state and that was filled in (GGUF only).
    """

    def __init__(
        self, model: Gemma2, tokenizer: Tokenizer, chat_tuned: bool | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.model, self.tokenizer, self.chat_tuned, self.notes = model, tokenizer, chat_tuned, tuple(notes)
        names = ("eos", "end_of_turn")
        self.stop_ids = frozenset(tokenizer.special[name] for name in names if name in tokenizer.special)

    @property
    def config(self) -> Gemma2Config:
        return self.model.config

    @overload
    def generate(self, prompts: str, max_new_tokens: int = ..., **options: Any) -> str: ...

    @overload
    def generate(self, prompts: Sequence[str], max_new_tokens: int = ..., **options: Any) -> list[str]: ...

    def generate(
        self, prompts: str | Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, **options: Any
    ) -> str | list[str]:
        """Continue a prompt, or each prompt of a list in one batch. Returns the continuations without the prompts.

        Args:
            prompts: text; an empty one continues from the BOS alone.
            max_new_tokens: tokens at most; the prompt and these must fit the context.
        Options, here and in `stream`, `chat` and `stream_chat`:
            stop: a string or several at which a row ends, not part of the text. `<eos>` and `<end_of_turn>` always do.
            seed: an integer or a torch.Generator, for sampling; the same seed gives the same tokens for the same batch.
            stats: a `Stats` to fill in.
            special: let control tokens spelled in a prompt be control tokens, see `Tokenizer.encode`.
            temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Default: greedy.
        Raises:
            ValueError, ContextOverflow, NonFiniteError: see `generate_ids` and `Sampling`.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        written = [""] * len(texts)
        for pieces in self._run(texts, max_new_tokens, **options):
            written = [text + piece for text, piece in zip(written, pieces, strict=True)]
        return written[0] if isinstance(prompts, str) else written

    def stream(self, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS, **options: Any) -> Iterator[str]:
        """`generate` for one prompt, piece by piece as it is written. Arguments are checked at once, not at the first
        piece; closing the iterator stops the computation and leaves the model as it was."""
        pieces = self._run([prompt], max_new_tokens, **options)
        return (piece for (piece,) in pieces if piece)

    def chat(self, messages: Conversation, max_new_tokens: int = MAX_NEW_TOKENS, **options: Any) -> str:
        """The model's answer to a conversation: {"role": "user" | "assistant", "content": text}, the user's last."""
        return "".join(self.stream_chat(messages, max_new_tokens, **options)).strip()

    def stream_chat(
        self, messages: Conversation, max_new_tokens: int = MAX_NEW_TOKENS, **options: Any
    ) -> Iterator[str]:
        """`chat`, piece by piece."""
        if not self.chat_tuned:
            warnings.warn("this checkpoint does not say that it was tuned for chat: it may ramble", stacklevel=2)
        pieces = self._run([chat_ids(messages, self.tokenizer)], max_new_tokens, **options)
        return (piece for (piece,) in pieces if piece)

    def _run(
        self,
        prompts: Sequence[str | list[int]],
        max_new_tokens: int,
        *,
        special: bool = False,
        stop: str | Sequence[str] = (),
        seed: int | torch.Generator | None = None,
        stats: Stats | None = None,
        **sampling: Any,
    ) -> Iterator[list[str]]:
        """Check everything, then return the iterator over each step's new text, one piece a row."""
        checked_count("max_new_tokens", max_new_tokens)
        settings = Sampling(**sampling)
        generator = make_generator(seed, self.model.model.embed_tokens.weight.device)
        stops = checked_stops(stop)
        ids = [self.tokenizer.encode(p, special=special) if isinstance(p, str) else p for p in prompts]
        replies = [Reply(self.tokenizer, self.stop_ids, stops) for _ in prompts]
        finished: set[int] = set()
        stats = stats or Stats()
        steps = generate_ids(self.model, ids, max_new_tokens, settings, generator, finished=finished, stats=stats)
        return _texts(steps, replies, finished, stats)


def _texts(steps: Iterator[list[int]], replies: list[Reply], finished: set[int], stats: Stats) -> Iterator[list[str]]:
    for ids in steps:
        pieces = [""] * len(replies)
        for row, reply in enumerate(replies):
            if row not in finished:
                pieces[row] = reply.push(ids[row])
                if reply.finish_reason:
                    finished.add(row)
        yield pieces
    stats.finish_reasons = [reply.finish_reason or "length" for reply in replies]
    yield [reply.flush() for reply in replies]
