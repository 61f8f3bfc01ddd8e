"""The part of `research.hooked` that has to do with text: ids and their spellings, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma2.checks import check_count
from gemma2.gemma import Gemma
from gemma2.generate import generate_ids
from gemma2.research.hooked_hooks import HookedHooks
from gemma2.research.lens_words import residual_directions
from gemma2.sampling import Sampling

Input = str | Sequence[str] | Tensor  # a text, several, or token ids [t] or [b t]


class HookedText(HookedHooks):
    """TransformerLens's methods for texts.

    Attributes:
        gemma: the `Gemma` it came from, which has the tokenizer; or None.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.gemma = model if isinstance(model, Gemma) else None

    @torch.no_grad()
    def generate(
        self,
        input: Input,
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        *,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        prepend_bos: bool = True,
        return_type: str = "input",
        verbose: bool = False,
    ) -> Any:
        """Continue texts or ids, with a cache. As in TransformerLens, it samples by default and returns the input too.

        Args:
            stop_at_eos: end a row at the checkpoint's end ids; what follows is `<eos>`.
            return_type: "str", "tokens", or "input" for what the input is. Ids are [b t], and texts of unequal length
                are padded on the left there.
            verbose: show a bar for a long prompt.
        """
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f'return_type is "input", "str" or "tokens", not {return_type!r}')
        check_count("max_new_tokens", max_new_tokens)
        rows = self._rows(input, prepend_bos)
        sampling = Sampling(temperature if do_sample else 0.0, top_k or 0, 1.0 if top_p is None else top_p)
        # Seeded by PyTorch's own generator, as TransformerLens's is: torch.manual_seed() makes it repeatable.
        generator = torch.Generator(self.model.device).manual_seed(int(torch.randint(2**62, (), device="cpu")))
        stops = self._gemma("stop_at_eos").stop_ids if stop_at_eos else frozenset[int]()
        cache = self.gemma.new_cache(len(rows), max(map(len, rows)) + max_new_tokens) if self.gemma else None
        finished = set[int]()
        steps = generate_ids(
            self.model,
            rows,
            max_new_tokens,
            sampling,
            generator,
            cache=cache,
            finished=finished,
            progress=verbose,
        )
        with self._standing():
            for new in steps:
                for number, token in enumerate(new):
                    rows[number].append(self._special("eos") if number in finished else token)
                    if token in stops:
                        finished.add(number)
        if return_type == "str" or (return_type == "input" and not isinstance(input, Tensor)):
            texts = [self._gemma("text").tokenizer.decode(row) for row in rows]
            return texts[0] if isinstance(input, str) or len(texts) == 1 else texts
        width = max(map(len, rows))
        padded = [[self._special("pad")] * (width - len(row)) + row if len(row) < width else row for row in rows]
        return torch.tensor(padded, device=self.model.device)

    def to_tokens(self, input: str | Sequence[str], prepend_bos: bool = True) -> Tensor:
        """Ids [b t] of a text or several, after a BOS. Shorter rows are padded on the right, where no token sees it."""
        rows = self._encoded(input, prepend_bos)
        width = max(map(len, rows))
        padded = [row + [self._special("pad")] * (width - len(row)) for row in rows]
        return torch.tensor(padded, device=self.model.device)

    def to_string(self, tokens: Tensor | Sequence[int]) -> Any:
        """The text of ids [t], or a list of texts of ids [b t]. Control tokens as the BOS have none."""
        ids = torch.as_tensor(tokens)
        if ids.ndim > 1:
            return [self.to_string(row) for row in ids]
        return self._gemma("text").tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(self, input: Any, prepend_bos: bool = True) -> Any:
        """The text of each token: of a text, of ids [t] or [1 t]; of a list, a list for each."""
        if isinstance(input, list | tuple) and not all(isinstance(one, int) for one in input):
            return [self.to_str_tokens(one, prepend_bos) for one in input]
        ids = self.to_tokens(input, prepend_bos)[0] if isinstance(input, str) else torch.as_tensor(input).squeeze()
        if ids.ndim > 1:
            raise ValueError(f"ids must be [t] or [1 t], not {list(ids.shape)}")
        tokenizer = self._gemma("text").tokenizer
        return [
            tokenizer.decode([token]) or (tokenizer.piece(token) if token < len(tokenizer) else f"<{token}>")
            for token in ids.reshape(-1).tolist()
        ]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises ValueError for another."""
        ids = self._gemma("text").tokenizer.encode(string, bos=False)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is not one token but {len(ids)}: {self.to_str_tokens(ids)}")
        return ids[0]

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The columns of `W_U` for tokens: [... d]."""
        return residual_directions(self.model, tokens, self.to_single_token)

    def _gemma(self, what: str) -> Gemma:
        if self.gemma is None:
            raise ValueError(f"{what} needs a tokenizer: call hooked() with the Gemma, not with its model")
        return self.gemma

    def _special(self, name: str) -> int:
        return self._gemma("text").tokenizer.special[name]

    def _rows(self, input: Input, prepend_bos: bool) -> list[list[int]]:
        if isinstance(input, Tensor):
            found: list[list[int]] = (input if input.ndim > 1 else input[None]).tolist()
            return found
        return self._encoded(input, prepend_bos)

    def _encoded(self, input: str | Sequence[str], prepend_bos: bool) -> list[list[int]]:
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"give a text, a list of texts or a tensor of ids, not {input!r}")
        tokenizer = self._gemma("text").tokenizer
        return [tokenizer.encode(text, bos=prepend_bos) for text in texts]

    def _ids(self, input: Input, prepend_bos: bool) -> Tensor:
        if isinstance(input, Tensor):
            return input if input.ndim > 1 else input[None]
        return self.to_tokens(input, prepend_bos)
