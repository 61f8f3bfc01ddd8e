"""lm-evaluation-harness over any Gemma of this package: `lm_eval.simple_evaluate(model=GemmaLM(gemma), tasks=[...])`.

Every request has the answer of the harness's own `hf` model on the same weights, but for what `BOS` says.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gemma2.chat import SYSTEM, spoken
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checks import check_count
from gemma2.errors import ContextOverflow
from gemma2.gemma import MAX_NEW_TOKENS, Gemma
from gemma2.generate import PREFILL_CHUNK
from gemma2.memory import free_memory
from gemma2.scoring import score_ids

BOS = {
    "once": "at the beginning of a text, once; later windows of a long text, and a text that was cut, have none",
    "every": "at the beginning of every window, and of a text that was cut",
    "hf": "as once, but twice before a text in rolling windows, as the harness's hf model has it",
}
CACHE, ROWS = 2 * 2**30, 32  # bytes and rows that a batch of texts to continue may have
SLICE = 1024  # requests after which answers are handed to the harness's cache
NEUTRAL: dict[str, Any] = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}  # what changes nothing here
SAMPLED = ("temperature", "top_k", "top_p", "min_p")

Tokens = tuple[tuple[str, str] | None, list[int], list[int]]  # what was asked, ids of the context, of its continuation


class GemmaLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types that hold
    """A model for the harness: scores and writes with the model's own modules, in whatever form they are.

    Control tokens spelled in a text are control tokens, as for the `hf` model: a chat template's turns are texts here.

    Args:
        gemma: any `Gemma`: from safetensors or GGUF, quantized, with faster twins, with an adapter.
        batch_size: texts computed at once, sorted by length. "auto": scores take as many as have 2,048 tokens
            together; texts to continue, as many as need at most 2 GiB of keys, values and scores, and at most 32.
        max_length: tokens that the model reads at once; default and most: the model's context. Longer texts lose
            their beginning, with a warning.
        bos: where the BOS stands, see `BOS`.
        progress: whether bars are shown on standard error; None shows them on a terminal.
    Attributes:
        title: put before the bars' own words.
    Raises:
        ValueError: an argument that cannot be.
    """

    def __init__(
        self,
        gemma: Gemma,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        bos: str = "once",
        progress: bool | None = None,
    ) -> None:
        super().__init__()
        if bos not in BOS:
            raise ValueError(f"bos must be {', '.join(BOS)}, not {bos!r}")
        context = gemma.config.max_position_embeddings
        self.gemma, self.bos, self.title = gemma, bos, ""
        self._batch = None if batch_size == "auto" else check_count("batch_size", batch_size, least=1)
        self.max_length = context if max_length is None else check_count("max_length", max_length, least=2)
        if self.max_length > context:
            raise ValueError(f"max_length {max_length} is more than the model's context of {context}")
        self._device, self._progress, self._lost = gemma.model.device, progress, list[int]()

    @property
    def eot_token_id(self) -> int:
        return self.gemma.tokenizer.special["eos"]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.gemma.tokenizer.special["bos"]

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a request that does not say how many: 256, as for the `hf` model."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return f"gemma2-{hashlib.sha256(self.gemma.tokenizer.to_proto()).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes beside its results."""
        return {
            "gemma2": version("gemma2"),
            "model_num_parameters": self.gemma.config.parameter_count,
            "model_dtype": dtype_name(self.gemma.model.dtype),
            "bos": self.bos,
            "max_length": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with a BOS unless `add_special_tokens` is False. One that the text spells is never doubled."""
        return self.gemma.tokenizer.encode(string, special=True, bos=add_special_tokens is not False)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation, and whether it is greedy."""
        pairs = [(request.args, *self._pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): the log-probability of all its tokens, in windows of `max_length`."""
        cut = [list(self._windows(request.args[0])) for request in requests]
        pairs = [(None, before, after) for windows in cut for before, after in windows]
        found = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        totals = []
        for request, windows in zip(requests, cut, strict=True):
            totals.append(sum(next(found)[0] for _ in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, options): what the model writes, up to the first stop string.

        Options of the harness: until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p, repetition_penalty.
        A sampled text depends on PyTorch's seed, which `simple_evaluate` sets, and has no top_k of its own.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        plans = [(*self._options(requests[members[0]].args[1]), members) for members in groups.values()]
        ids = [self.tok_encode(request.args[0]) for request in requests]
        for new, _, members in plans:
            for i in members:
                ids[i] = self._cut(ids[i], self.max_length - new)
        self._say_what_is_lost()
        written = [""] * len(requests)
        with self._bar("writing", len(requests), " texts", disable_tqdm) as bar:
            for new, options, members in plans:
                order = sorted(members, key=lambda i: -len(ids[i]))
                while order:
                    many = self._batch or self._rows(len(ids[order[0]]) + new)
                    now, order = order[:many], order[many:]
                    if "temperature" in options:  # each batch draws anew: else equal prompts would have equal samples
                        options["seed"] = int(torch.randint(2**31, ()))
                    found = self.gemma.generate([ids[i] for i in now], new, **options)
                    for i, text in zip(now, found, strict=True):
                        written[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(now))
        return written

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Gemma's turns as a text, with the BOS. A system message is left out, with a warning, as by the `hf` model."""
        said = [message for message in chat_history if message.get("role") != SYSTEM]
        if len(said) < len(chat_history):
            warnings.warn("Gemma 2 has no system role: the system message is left out", stacklevel=2)
        turns, open_turn = spoken(said, continue_final_message=not add_generation_prompt)
        whole = "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)
        return f"<bos>{whole}<start_of_turn>{open_turn}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness notes of the template: Gemma's turns, whatever template the checkpoint has."""
        return self.apply_chat_template([{"role": "user", "content": "..."}]) if chat_template else None

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As `TemplateLM` has it, with empty texts."""
        if context:
            before, after = self._encode_pair(context, continuation)
            return before, after
        after, bos = self.tok_encode(continuation, add_special_tokens=False), self.prefix_token_id
        return [bos], after[1:] if after[:1] == [bos] else after

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """The harness's windows over a text: what is read before, and what is asked about."""
        bos, ids = self.prefix_token_id, self.tok_encode(text)
        every = self.bos == "every"
        tokens = ids if self.bos == "hf" else ids[1:]
        for window in get_rolling_token_windows(tokens, bos, self.max_length - every, context_len=1):
            before, after = make_disjoint_window(window)
            yield ([bos, *before] if every and before[0] != bos else before), after

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(before, after) for _, before, after in requests]
        self._say_what_is_lost()
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0] + pairs[i][1]), pairs[i]))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        total = sum(len(before + after) - bool(after) for before, after in pairs)
        with self._bar("scoring", total, " tokens", disable_tqdm) as bar:
            for start in range(0, len(order), SLICE):
                now = order[start : start + SLICE]
                found = score_ids(self.gemma.model, [pairs[i] for i in now], batch=self._batch, tick=bar.update)
                for i, one in zip(now, found, strict=True):
                    answers[i] = float(one.logprobs.double().sum()), bool(one.greedy.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def _fitted(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """A pair of which the model reads at most `max_length` tokens: what is too long loses its beginning."""
        if not after:
            warnings.warn("a continuation has no token: its log-probability is 0", stacklevel=2)
        most = self.max_length + bool(after)  # the last token is asked about, and not read
        if len(after) >= most:
            raise ContextOverflow(
                f"a continuation of {len(after):,} tokens: the model reads {self.max_length:,} at once, one before it"
            )
        return self._cut(before, most - len(after)), after

    def _cut(self, ids: list[int], most: int) -> list[int]:
        if len(ids) <= most:
            return ids
        self._lost.append(len(ids) - most)
        if self.bos == "every" and most > 1:
            return [self.prefix_token_id, *ids[len(ids) - most + 1 :]]
        return ids[-most:]

    def _say_what_is_lost(self) -> None:
        lost, self._lost = self._lost, []
        if lost:
            bos = "; the BOS stays" if self.bos == "every" else ", the BOS too"
            warnings.warn(
                f"{len(lost):,} texts are too long for the {self.max_length:,} tokens that are read at once: each "
                f"loses its beginning, up to {max(lost):,} tokens{bos}",
                stacklevel=3,
            )

    def _options(self, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """New tokens, and the options of `Gemma.generate`. Raises ValueError for what there is not."""
        asked = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        new, sampled = asked.pop("max_gen_toks"), asked.pop("do_sample")
        if not 0 < new < self.max_length:
            raise ValueError(
                f"max_gen_toks is {new}: it is at least 1, and less than the {self.max_length} tokens read"
            )
        stops = [*asked.pop("until"), self.gemma.tokenizer.piece(self.eot_token_id)]
        options: dict[str, Any] = {"stop": list(dict.fromkeys(filter(None, stops)))}
        for name in SAMPLED:
            value = asked.pop(name, None)
            if sampled and value is not None:
                options[name] = value
        if sampled:
            options.setdefault("temperature", 1.0)
        if "repetition_penalty" in asked:
            options["repetition_penalty"] = asked.pop("repetition_penalty")
        other = [name for name, value in asked.items() if name not in NEUTRAL or NEUTRAL[name] != value]
        if other:
            raise ValueError(f"generation here has no option {', '.join(other)}, which a task asks for")
        return new, options

    def _rows(self, length: int) -> int:
        """How many texts of so many tokens, with the new ones, are continued at once."""
        config, free = self.gemma.config, free_memory(self.gemma.model.device)
        size = self.gemma.model.dtype.itemsize
        held = sum(min(length, config.window(i) or length) for i in range(config.num_hidden_layers))
        kept = 2 * held * config.num_key_value_heads * config.head_dim * size
        scores = config.num_attention_heads * min(length, PREFILL_CHUNK) * length * size
        most = CACHE if free is None else min(CACHE, free.bytes // 2)
        return int(max(1, min(ROWS, most // (kept + scores))))

    @contextmanager
    def _bar(self, does: str, total: int, unit: str, disabled: bool) -> Iterator[Any]:
        hidden = True if disabled else None if self._progress is None else not self._progress
        words = f"{self.title}: {does}" if self.title else does
        with tqdm(total=total, desc=words, unit=unit, unit_scale=total > 9999, disable=hidden, leave=False) as bar:
            yield bar
