"""Gemma: a model with its tokenizer, what people hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, Unpack, overload

import torch

from gemma2.cache import Cache, HybridCache
from gemma2.chat import Conversation, chat_ids, continues, listed
from gemma2.checks import check_count, plain_number
from gemma2.config import Gemma2Config
from gemma2.detokenizer import Detokenizer, parse_stops
from gemma2.feed import Feed, Processor
from gemma2.generate import generate_ids
from gemma2.model import Gemma2
from gemma2.sampling import Sampling, make_generator
from gemma2.scored_text import Pair
from gemma2.scoring import Score, Scoring, score
from gemma2.stats import Stats
from gemma2.templates import NOT_GEMMAS, is_gemmas
from gemma2.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Options without effect in greedy decoding -> the values that leave them out.
IDLE: dict[str, tuple[Any, ...]] = {"seed": (None, -1), "top_k": (None, 0, -1), "top_p": (None, 1), "min_p": (None, 0)}
Unset = int | float | None  # the types of those values
NOT_TUNED = "this checkpoint does not say that it was tuned for chat: it may ramble"
# Options of transformers that have another name here, or that are not here.
ELSEWHERE = {
    "do_sample": "temperature above 0 samples",
    "max_length": "max_new_tokens counts the new tokens",
    "stop_strings": "use stop",
    "logits_processor": "use processors",
    "past_key_values": "use cache",
    "streamer": "use stream()",
    "num_beams": "there is no beam search",
    "system": "it is an option of chat, stream_chat and Talk",
    "continue_final_message": "it is an option of chat and stream_chat",
}
Prompt = str | Sequence[int]  # text, or token ids (with their BOS)


class Rewindable(Cache, Protocol):
    """A cache that can forget what it was fed last."""

    def rollback(self, length: int) -> None: ...

    def reset(self) -> None: ...


class Options(TypedDict, total=False):
    """What `Gemma.generate`, `stream`, `chat` and `stream_chat` take; `Gemma.generate` says what each means."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | torch.Generator | None
    stop: str | Sequence[str] | None
    special: bool
    processors: Sequence[Processor]
    cache: Cache | None
    feed: Feed | None
    stats: Stats | None


class Gemma:
    """A model with its tokenizer, ready to write.

    Attributes:
        model: the `Gemma2` module: tokens [b t] -> logits [b t v].
        tokenizer: text to ids and back.
        chat_tuned: whether the checkpoint says it was tuned for chat; None when it says nothing.
        notes: a line for everything that the checkpoint does not state and that was filled in, or that it states and
            that is not done.
        chat_template: the text of the checkpoint's chat template, which is passed on by `convert` and never run.
        stop_ids: ids at which a text ends: Gemma's `<eos>` and `<end_of_turn>`, and `end_ids` of the checkpoint.
        companions: what the checkpoint's small files say for other programs, by the name of the file: special tokens,
            and how transformers generates. Passed on by `save` and `as_transformers`, and never interpreted.
    """

    def __init__(
        self,
        model: Gemma2,
        tokenizer: Tokenizer,
        chat_tuned: bool | None = None,
        notes: Sequence[str] = (),
        chat_template: str | None = None,
        end_ids: Iterable[int] = (),
        companions: Mapping[str, Mapping[str, Any]] | None = None,
        cache: Callable[..., Rewindable] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.chat_tuned, self.notes = model, tokenizer, chat_tuned, tuple(notes)
        self.chat_template, self.companions = chat_template, dict(companions or {})
        self.stop_ids = tokenizer.end_ids | frozenset(end_ids)
        self._cache = cache

    @property
    def config(self) -> Gemma2Config:
        return self.model.config

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> Rewindable:
        """An empty cache of the kind that this model computes with; the arguments are those of `HybridCache`."""
        if self._cache is None:
            return HybridCache(self.config, batch, capacity, slack)
        return self._cache(self.model, batch, capacity, slack)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence too
        self, prompts: str, max_new_tokens: int = ..., **options: Unpack[Options]
    ) -> str: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int = ..., **options: Unpack[Options]
    ) -> list[str]: ...

    def generate(
        self, prompts: str | Sequence[Prompt], max_new_tokens: int = MAX_NEW_TOKENS, **options: Unpack[Options]
    ) -> str | list[str]:
        """Continue a prompt, or each prompt of a list in one batch. Returns the continuations without the prompts.

        Args:
            prompts: text, or a list in which each is a text or a list of token ids; an empty text continues from the
                BOS alone.
            max_new_tokens: tokens at most; the prompt and these must fit the context.
        Options, here and in `stream`, `chat` and `stream_chat`:
            temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Default: greedy.
            seed: an integer or a torch.Generator, for sampling; the same seed gives the same tokens for the same batch.
                None and -1: another one each time.
            stop: a string or several at which a row ends, not part of the text. A row always ends at `stop_ids`.
            special: let control tokens spelled in a prompt be control tokens, see `Tokenizer.encode`.
            processors, cache, feed: see `generate_ids`. A text that continues a filled cache gets no BOS; processors
                and the repetition penalty then know this text alone, not what the cache holds.
            stats: a `Stats` to fill in.
        Raises:
            TypeError: an unknown option.
            ValueError, ContextOverflow, NonFiniteError: see `generate_ids` and `Sampling`.
        """
        if not isinstance(prompts, str | list | tuple):
            raise ValueError(f"prompts must be a text or a list of texts, not {type(prompts).__name__}")
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        written = [""] * len(rows)
        for pieces in self._run(rows, max_new_tokens, **options):
            written = [text + piece for text, piece in zip(written, pieces, strict=True)]
        return written[0] if isinstance(prompts, str) else written

    def stream(self, prompt: Prompt, max_new_tokens: int = MAX_NEW_TOKENS, **options: Unpack[Options]) -> Iterator[str]:
        """`generate` for one prompt, piece by piece as it is written. Arguments are checked at once, not at the first
        piece; closing the iterator stops the computation and leaves the model as it was."""
        pieces = self._run([prompt], max_new_tokens, **options)
        return (piece for (piece,) in pieces if piece)

    def chat(
        self,
        messages: Conversation,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        system: str | None = None,
        continue_final_message: bool | None = None,
        **options: Unpack[Options],
    ) -> str:
        """The model's answer to a conversation: {"role": "user" | "assistant", "content": text}, the user's last.

        Where the last message is the assistant's, it is taken for the beginning of the answer, and what is returned
        continues it. `chat_ids` says what else messages may be.

        Args:
            system: "merge" puts messages of the role "system" before the user message that follows; None refuses them.
            continue_final_message: True or False where the last message must be the assistant's, or must not.
        """
        messages = listed(messages)
        pieces = self.stream_chat(
            messages, max_new_tokens, system=system, continue_final_message=continue_final_message, **options
        )
        text = "".join(pieces)
        return text.rstrip() if continues(messages, continue_final_message) else text.strip()

    def stream_chat(
        self,
        messages: Conversation,
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        system: str | None = None,
        continue_final_message: bool | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """`chat`, piece by piece. Every call computes the whole conversation; `gemma2.Talk` keeps what it computed."""
        ids = chat_ids(messages, self.tokenizer, system=system, continue_final_message=continue_final_message)
        warn_of_chat(self)
        return self.stream(ids, max_new_tokens, **options)

    @overload
    def score(  # type: ignore[overload-overlap]  # a str and a tuple are sequences too
        self, texts: str | Pair | Sequence[int], **options: Unpack[Scoring]
    ) -> Score: ...

    @overload
    def score(self, texts: Sequence[Prompt | Pair], **options: Unpack[Scoring]) -> list[Score]: ...

    def score(self, texts: Prompt | Pair | Sequence[Prompt | Pair], **options: Unpack[Scoring]) -> Score | list[Score]:
        """How likely the model finds a text, each of a list of texts, or a continuation: `(context, continuation)`.

        Every token is predicted once, behind the BOS and what is before it in its window. The BOS itself and a context
        are not scored. Log-probabilities have the final cap, and are natural logarithms.

        Args:
            texts: a text, a list of token ids (with their BOS), a tuple of two (context, continuation), or a list of
                any of these.
        Options:
            window: tokens that the model reads at once, the BOS among them; default and most: the model's context.
            stride: tokens by which a next window ends later than the one before; default: half of the window.
            batch: windows that are computed at once, sorted by length; default: as many as have 2,048 tokens together.
            special: let control tokens spelled in a text be control tokens, see `Tokenizer.encode`.
            tick: called with a number of tokens whenever so many were computed, for a progress bar.
        Raises:
            ValueError: a text without a token, ids without a BOS or outside the vocabulary, wrong counts, a window
                beyond the context.
        """
        return score(self.model, self.tokenizer, texts, **options)

    def _run(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Unpack[Options]) -> Iterator[list[str]]:
        """Check everything, then return the iterator over each step's new text, one piece a row."""
        check_options(options)
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        sampling = sampling_of(options)
        generator = make_generator(options.get("seed"), self.model.device)
        stops = parse_stops(options.get("stop"))
        cache, stats, finished = options.get("cache"), options.get("stats") or Stats(), set[int]()
        if not prompts:
            raise ValueError("there is no prompt: give a text, or a list with at least one")
        fresh = cache is None or not cache.length
        ids = [self._ids(prompt, options.get("special", False), fresh) for prompt in prompts]
        rows = [Detokenizer(self.tokenizer, self.stop_ids, stops) for _ in prompts]
        if cache is None and self._cache and all(ids):
            cache = self.new_cache(len(ids), max(map(len, ids)) + max_new_tokens)
        steps = generate_ids(
            self.model,
            ids,
            max_new_tokens,
            sampling,
            generator,
            processors=options.get("processors") or (),
            cache=cache,
            feed=options.get("feed"),
            finished=finished,
            stats=stats,
        )
        return _texts(steps, rows, finished, stats)

    def _ids(self, prompt: Prompt, special: bool, bos: bool) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special=special, bos=bos)
        if not isinstance(prompt, list | tuple):
            raise ValueError(f"a prompt must be a text or a list of token ids, not {prompt!r}")
        return prompt


def warn_of_chat(gemma: Gemma) -> None:
    """Warn the caller's caller where chat may not be what this checkpoint was made for."""
    note = chat_note(gemma)
    if note:
        warnings.warn(note, stacklevel=3)


def chat_note(gemma: Gemma) -> str | None:
    """Why chat may not be what this checkpoint was made for, or None."""
    if gemma.chat_template is not None and not is_gemmas(gemma.chat_template):
        return NOT_GEMMAS
    return None if gemma.chat_tuned else NOT_TUNED


def sampling_of(options: Options) -> Sampling:
    """The options' sampling. Raises ValueError for a value out of its range; warns of one that has no effect."""
    given = {name: options[name] for name in SAMPLING if name in options}  # type: ignore[literal-required]
    sampling = Sampling(**given)
    idle = idle_options(options) if sampling.greedy else []
    if idle:
        warnings.warn(f"no effect without a temperature, since decoding is greedy: {', '.join(idle)}", stacklevel=4)
    return sampling


def idle_options(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that are set and have no effect in greedy decoding."""
    given = {name: plain_number(options.get(name)) for name in IDLE}
    return [name for name, value in given.items() if not isinstance(value, Unset) or value not in IDLE[name]]


def check_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError for an unknown option, and says what to use where transformers has that option."""
    for name in options:
        if name not in Options.__annotations__:
            hint = ELSEWHERE.get(name, f"there are {', '.join(Options.__annotations__)}")
            raise TypeError(f"generation has no option {name!r}: {hint}")


def _texts(
    steps: Iterator[list[int]], rows: list[Detokenizer], finished: set[int], stats: Stats
) -> Iterator[list[str]]:
    for ids in steps:
        pieces = [""] * len(rows)
        for number, row in enumerate(rows):
            if number not in finished:
                pieces[number] = row.push(ids[number])
                if row.finish_reason:
                    finished.add(number)
        yield pieces
    stats.finish_reasons = [row.finish_reason or "length" for row in rows]
    yield [row.flush() for row in rows]
