"""A conversation that keeps its cache: each turn computes only what is new."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from itertools import takewhile
from typing import Any, Unpack

import torch
from torch import Tensor

from gemma2.chat import Conversation, chat_ids, listed
from gemma2.checks import check_count
from gemma2.errors import ContextOverflow
from gemma2.feed import Processor
from gemma2.gemma import MAX_NEW_TOKENS, Gemma, Options, check_options, sampling_of, warn_of_chat
from gemma2.sampling import repetition_penalty
from gemma2.stats import Stats


class Talk:
    """Turns of a user and the model, with everything computed so far kept in a cache.

    The replies are those of `Gemma.stream_chat` on the whole conversation, but for rounding. A turn rolls the cache
    back to the ids that the new prompt has in common with what was fed, and feeds the rest.

        talk = Talk(gemma, max_new_tokens=200, temperature=0.7)
        for piece in talk.say("Who made the world?"):
            print(piece, end="", flush=True)

    Args:
        gemma: a model tuned for chat.
        max_new_tokens: of each reply.
        messages: what the talk begins with, as `Gemma.chat` takes it: earlier turns, or a system message.
        system: "merge" puts system messages before the user message that follows, as in `Gemma.chat`.
        options: as `Gemma.generate`; the cache is the talk's own.

    Attributes:
        messages: the turns so far, as `Gemma.chat` takes them. A reply that was broken off is kept as far as it went.
    """

    def __init__(
        self,
        gemma: Gemma,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        messages: Conversation = (),
        system: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        check_options(options)
        self._penalty = sampling_of(options).repetition_penalty
        if any(options.get(name) is not None for name in ("cache", "feed", "stats")):
            raise ValueError("a talk has a cache of its own: leave cache and feed out, and give stats to say()")
        self.beginning = listed(messages)
        chat_ids([*self.beginning, {"role": "user", "content": ""}], gemma.tokenizer, system=system)
        warn_of_chat(gemma)
        self.gemma, self.max_new_tokens, self.system, self.options = gemma, max_new_tokens, system, options
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, up to what it began with."""
        context = self.gemma.config.max_position_embeddings
        self.messages: list[Mapping[str, Any]] = list(self.beginning)
        self.cache = self.gemma.new_cache(1, context, slack=min(self.max_new_tokens, context))
        self._fed: list[int] = []
        self._computed = self._computes()

    def say(self, content: str | list[dict[str, str]], stats: Stats | None = None) -> Generator[str, None, None]:
        """The reply, piece by piece. Closing the iterator, or Ctrl-C inside it, ends the reply and keeps the talk.

        Args:
            content: the user's text, or parts of it as in `Gemma.chat`.
            stats: filled in while the reply is made.
        Raises:
            ContextOverflow, ValueError: as `Gemma.generate`, before anything is computed; the turn is then not kept.
        """
        messages: list[Mapping[str, Any]] = [*self.messages, {"role": "user", "content": content}]
        ids = chat_ids(messages, self.gemma.tokenizer, system=self.system)
        context, new = self.gemma.config.max_position_embeddings, self.max_new_tokens
        if len(ids) + new > context:
            raise ContextOverflow(
                f"the conversation is {len(ids)} tokens long, and {new} new ones exceed the context of {context}"
            )
        kept = self._rolled_back(ids)
        options: Options = {**self.options, "cache": self.cache, "processors": self._processors(ids[:kept])}
        options["repetition_penalty"] = 1.0  # it is among the processors, which know the whole conversation
        options["stats"] = stats
        pieces = self.gemma.stream(ids[kept:], self.max_new_tokens, **options)
        return self._kept(messages, pieces)

    def _kept(self, messages: list[Mapping[str, Any]], pieces: Iterator[str]) -> Generator[str, None, None]:
        reply, failed = "", False
        try:
            for piece in pieces:
                reply += piece
                yield piece
        except Exception:  # not Ctrl-C, nor an iterator that is closed
            failed = True
            self.reset_cache()
            raise
        finally:
            if not failed:
                self.messages = [*messages, {"role": "assistant", "content": reply}]

    def reset_cache(self) -> None:
        """Compute the whole conversation anew in the next turn."""
        self.cache.reset()
        self._fed = []

    def _computes(self) -> tuple[object, ...]:
        """What the cache's values depend on beside the ids: where and in which dtype the model computes now."""
        model = self.gemma.model
        kind = model.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return model.dtype, model.device, autocast

    def _rolled_back(self, ids: list[int]) -> int:
        """How many ids of the new prompt the cache holds, after forgetting the others; one at least is to be fed."""
        if self._computed != self._computes():
            self.reset_cache()
        pairs = zip(self._fed, ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        try:
            self.cache.rollback(common)
        except (ValueError, RuntimeError):  # beyond the slack, or broken off in the middle of a pass
            self.reset_cache()
            return 0
        self._fed = self._fed[:common]
        return common

    def _processors(self, held: list[int]) -> list[Processor]:
        """The options' processors, given the whole conversation; the first notes what has been fed."""
        before = torch.tensor([held], dtype=torch.int64, device=self.gemma.model.device)
        asked = list(self.options.get("processors") or ())
        if self._penalty != 1.0:
            asked.insert(0, repetition_penalty(self._penalty, torch.zeros(1, 1, device=before.device)))

        def process(ids: Tensor, logits: Tensor) -> Tensor:
            self._computed = self._computes()
            whole = torch.cat((before, ids), dim=1)
            self._fed = whole[0].tolist()
            for processor in asked:
                logits = processor(whole, logits)
            return logits

        return [process]
