"""Perplexity by the protocols that published figures follow. They differ in which tokens are scored and behind what.

- llama.cpp: chunks of `context` tokens that do not overlap, a BOS in place of the first token of each, and only the
  second half of each is scored. What `llama-perplexity` does (tools/perplexity/perplexity.cpp). As it reads a file, one
  newline at the end of a text is left out (common/arg.cpp, --file).
- transformers: windows that overlap, as in transformers' guide "Perplexity of fixed-length models". Later windows have
  no BOS, without which Gemma 2 predicts badly; and the guide weighs the mean of a later window by one token too few.
- documents: each text by itself and whole, behind a BOS; a text longer than the context in windows that overlap, each
  with a BOS (`Gemma.score`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma2.checks import check_count
from gemma2.gemma import Gemma
from gemma2.scored_text import Text, as_list
from gemma2.scoring import Tick, perplexity_of, score_ids

LLAMA_CPP, TRANSFORMERS, DOCUMENTS = "llama.cpp", "transformers", "documents"
PROTOCOLS = (LLAMA_CPP, TRANSFORMERS, DOCUMENTS)
CONTEXT = {LLAMA_CPP: 512, TRANSFORMERS: 1024}  # their own defaults: n_ctx, and GPT-2's length in the guide
STRIDE = 512  # the guide's


@dataclass(frozen=True)
class Perplexity:
    """What a protocol measures on texts.

    Attributes:
        nats: mean negative log-probability of a scored token, weighed as the protocol does.
        tokens: that were scored.
        error: standard error of `nats` over tokens, as llama.cpp computes it; None for fewer than two tokens.
        running: perplexity after each chunk, window or text, as llama.cpp prints it.
        bytes: of the texts, where every token of them is scored; else None.
        context, stride: tokens of a window, and from one window to the next; None where the protocol has none.
    """

    protocol: str
    nats: float
    tokens: int
    error: float | None
    running: list[float]
    bytes: int | None
    context: int
    stride: int | None

    @property
    def value(self) -> float:
        return perplexity_of(self.nats)

    @property
    def plus_minus(self) -> float | None:
        """Standard error of the perplexity: llama.cpp's "+/-"."""
        return None if self.error is None else self.error * self.value

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.bytes is None else self.nats * self.tokens / math.log(2) / self.bytes


@dataclass(frozen=True)
class _Part:
    """Tokens of one chunk or window: what stands before them, they themselves, and how much their mean counts."""

    before: list[int]
    asked: list[int]
    weight: int


def perplexity(
    gemma: Gemma,
    texts: Text | Sequence[Text],
    protocol: str = LLAMA_CPP,
    *,
    context: int | None = None,
    stride: int | None = None,
    chunks: int | None = None,
    batch: int | None = None,
    tick: Tick = lambda tokens: None,
) -> Perplexity:
    """The perplexity of texts, or of one text.

    Args:
        texts: a text or its token ids (with their BOS), or a list of such documents; the protocols of llama.cpp and
            transformers take one.
        protocol: "llama.cpp", "transformers" or "documents", see the top of this file.
        context: tokens of a chunk or window; default 512 (llama.cpp), 1,024 (transformers) or the model's context.
        stride: from one window to the next; default 512 or the whole context if that is shorter (transformers), or half
            the context (documents).
        chunks: use the first so many chunks, windows or documents; default all.
        batch: chunks that are computed at once; default: as many as have 2,048 tokens together.
        tick: called with a number of tokens whenever so many were computed; `work` says how many that is in all.
    Raises:
        ValueError: an unknown protocol, counts that cannot be, a text that is too short or empty, ids without a BOS.
    """
    documents, _ = as_list(texts)
    context, stride = check_protocol(protocol, gemma.config.max_position_embeddings, context, stride)
    if chunks is not None:
        check_count("chunks", chunks, least=1)
    if protocol == DOCUMENTS:
        documents = documents[:chunks]
        scores = gemma.score(documents, window=context, stride=stride, batch=batch, tick=tick)
        logprobs = [one.logprobs.double() for one in scores]
        size = sum(one.bytes for one in scores)
        return _summed(protocol, logprobs, [len(one) for one in logprobs], size, context, stride)
    if len(documents) != 1:
        raise ValueError(f"{protocol}'s protocol takes one text, not {len(documents)}: join them")
    ids = ids_of(gemma, documents[0], protocol)
    parts = list(_parts(ids, protocol, context, stride))[:chunks]
    if not parts:
        raise ValueError(f"the text has {len(ids):,} tokens: {_least(protocol, context)}")
    found = score_ids(gemma.model, [(part.before, part.asked) for part in parts], batch=batch, tick=tick)
    return _summed(
        protocol, [one.logprobs.double() for one in found], [part.weight for part in parts], None, context, stride
    )


def check_protocol(protocol: str, most: int, context: int | None, stride: int | None) -> tuple[int, int | None]:
    """Context and stride, those given or the protocol's own. Raises ValueError for what cannot be.

    Args:
        most: the model's context.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}: there are {', '.join(PROTOCOLS)}")
    length = check_count("context", CONTEXT.get(protocol, most) if context is None else context, least=4)
    if length > most:
        raise ValueError(f"context {length:,} is beyond the model's context of {most:,}")
    if protocol == LLAMA_CPP:
        if stride is not None:
            raise ValueError("llama.cpp's protocol has no stride: its chunks do not overlap")
        return length, None
    step = min(length, STRIDE) if protocol == TRANSFORMERS else length // 2
    step = check_count("stride", step if stride is None else stride, least=1)
    if step > length:
        raise ValueError(f"stride {step} is longer than the context of {length}: tokens between would not count")
    return length, step


def ids_of(gemma: Gemma, text: Any, protocol: str) -> list[int]:
    """The ids of a text as a protocol reads it, with the BOS. Raises ValueError for ids without one."""
    if isinstance(text, str):
        return gemma.tokenizer.encode(text.removesuffix("\n") if protocol == LLAMA_CPP else text)
    if not isinstance(text, Sequence):
        raise ValueError(f"a text must be text or a list of token ids, not {text!r}")
    bos = gemma.tokenizer.special["bos"]
    if not text or text[0] != bos:
        raise ValueError(f"the token ids do not begin with the BOS ({bos})")
    return list(text)


def work(tokens: int, protocol: str, context: int, stride: int | None, chunks: int | None = None) -> int:
    """How many tokens `perplexity` computes for a text of so many, its BOS among them, for a progress bar."""
    if protocol == DOCUMENTS:
        return tokens
    parts = list(_parts(list(range(tokens)), protocol, context, stride))[:chunks]
    return sum(len(part.before) + len(part.asked) - 1 for part in parts)


def _parts(ids: list[int], protocol: str, context: int, stride: int | None) -> Iterator[_Part]:
    if protocol == TRANSFORMERS:
        assert stride is not None
        yield from _strided(ids, context, stride)
    elif len(ids) >= 2 * context:  # with less, llama.cpp refuses
        half = context // 2
        for start in range(0, len(ids) - context + 1, context):
            chunk = [ids[0], *ids[start + 1 : start + context]]
            yield _Part(chunk[: half + 1], chunk[half + 1 :], context - 1 - half)


def _strided(ids: list[int], context: int, stride: int) -> Iterator[_Part]:
    """The guide's loop: a window's new tokens are its labels, of which the very first of a window has no prediction."""
    done = 0
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        labels = end - done
        known = max(1, end - start - labels)
        if end - start > known:
            yield _Part(ids[start : start + known], ids[start + known : end], labels - 1)
        done = end
        if end == len(ids):
            return


def _summed(
    protocol: str, logprobs: list[Tensor], weights: list[int], size: int | None, context: int, stride: int | None
) -> Perplexity:
    nats = total = 0.0
    running = []
    for each, weight in zip(logprobs, weights, strict=True):
        nats, total = nats - float(each.mean()) * weight, total + weight
        running.append(perplexity_of(nats / total) if total else math.nan)
    every = torch.cat(logprobs)
    spread = float((every**2).mean() - every.mean() ** 2)
    error = math.sqrt(max(0.0, spread) / (len(every) - 1)) if len(every) > 1 else None
    return Perplexity(protocol, nats / total, len(every), error, running, size, context, stride)


def _least(protocol: str, context: int) -> str:
    if protocol == LLAMA_CPP:
        return f"llama.cpp's protocol needs at least twice the context of {context:,}"
    return "there is none to score"
