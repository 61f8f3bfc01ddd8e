"""Gemma: a model with its tokenizer, what people hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from gemma2.chat import chat_ids
from gemma2.config import Gemma2Config
from gemma2.detokenizer import Detokenizer, checked_stops
from gemma2.generate import Stats, generate_ids
from gemma2.model import Gemma2
from gemma2.sampling import Sampling, checked_count, make_generator
from gemma2.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256

Conversation = Sequence[Mapping[str, str]]  # {"role": ..., "content": ...}, see `chat_ids`


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
        replies = [Detokenizer(self.tokenizer, self.stop_ids, stops) for _ in prompts]
        finished: set[int] = set()
        stats = stats or Stats()
        steps = generate_ids(self.model, ids, max_new_tokens, settings, generator, finished=finished, stats=stats)
        return _texts(steps, replies, finished, stats)


def _texts(
    steps: Iterator[list[int]], replies: list[Detokenizer], finished: set[int], stats: Stats
) -> Iterator[list[str]]:
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
