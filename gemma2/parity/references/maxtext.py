"""MaxText's golden logits as a reference: a JSON Lines file, each line an object with `prompt`, `tokens` (ids [t]) and
`logits` [t v], as its tests/utils/forward_pass_logit_checker.py reads them (AI-Hypercomputer/maxtext, e591f30,
2026-08-22). Such a file names neither the model's numbers nor the dtype."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.parity.references import parse_sites
from gemma2.parity.references.trace import Recorded

LOGITS = "logits"


class MaxTextLogits(Recorded):
    """A `Reference` over one line. Its one site is `logits`; further columns than the vocabulary has, as the 128 that
    Google's own table adds, are left out.

    Args:
        path: the file; `line`: which line, from 1.
        config: of the model that it is compared with.
        dtype: in which it was computed. MaxText's own are of float32.
    Raises:
        BadModelFile: not such a line, or of another vocabulary.
    """

    def __init__(self, path: Path, line: int, config: Gemma2Config, dtype: torch.dtype | None) -> None:
        where = f"{path}: line {line}"
        stated = _line(path, line)
        missing = [key for key in ("tokens", LOGITS) if key not in stated]
        if missing:
            raise BadModelFile(
                f"{where} has no {' and no '.join(missing)}: MaxText's golden logits have prompt, tokens"
            )
        ids, vocab = stated["tokens"], config.vocab_size
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise BadModelFile(f"{where}: tokens must be a list of token ids in [0, {vocab})")
        try:
            logits = torch.tensor(stated[LOGITS], dtype=torch.float32, device="cpu")
        except (ValueError, TypeError, RuntimeError, OverflowError):  # the last: a whole number of hundreds of digits
            raise BadModelFile(f"{where}: logits must be {len(ids)} lists of numbers, all of one length") from None
        if logits.ndim != 2 or logits.shape[0] != len(ids) or logits.shape[1] < vocab:
            raise BadModelFile(f"{where}: logits are {list(logits.shape)}, and must be [{len(ids)}, {vocab}] or wider")
        if logits.isnan().any():
            raise BadModelFile(f"{where}: logits are NaN at {logits.isnan().nonzero()[0].tolist()}")
        self._path, self._logits = path, logits[:, :vocab].contiguous()
        self.system, self.config, self.dtype = f"line {line} of MaxText's golden logits", config, dtype or torch.float32
        self.versions: Mapping[str, str] = {}
        self.ids, self.sites = ids, frozenset([LOGITS])
        self.longest: int | None = len(ids)

    @property
    def states_config(self) -> bool:
        return False

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        self._check_ids(ids)
        return dict.fromkeys(parse_sites(self, sites), self._logits)


def open_maxtext(spec: str, config: Gemma2Config, dtype: torch.dtype | None) -> MaxTextLogits:
    """`FILE.jsonl`, or `maxtext:FILE` with `:N` for another line than the first. Raises as `MaxTextLogits`."""
    name = spec.removeprefix("maxtext:")
    rest, colon, number = name.rpartition(":")
    if colon and number.isdecimal():
        return MaxTextLogits(Path(rest), int(number), config, dtype)
    return MaxTextLogits(Path(name), 1, config, dtype)


def _line(path: Path, number: int) -> dict[str, Any]:
    """The object in a line. A line may be long: 4 token ids of Gemma 2 are some 20 MB."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = 0
            for lines, text in enumerate(file, 1):
                if lines == number:
                    found = json.loads(text)
                    break
            else:
                raise BadModelFile(f"{path}: has {lines} lines, and line {number} was asked for")
    except BadModelFile:
        raise
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path}: line {number} is not valid JSON ({str(error)[:200]})") from None
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise BadModelFile(f"{path}: line {number} is no JSON object")
    return found
