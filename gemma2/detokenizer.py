"""Ids to text as it grows, token by token: whole characters only, and nothing beyond a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2.tokenizer import Tokenizer, check_text


def parse_stops(stop: str | Sequence[str] | None) -> list[str]:
    """One stop string or several as a list, none for None. Raises ValueError for one that is empty or no text."""
    if stop is None:
        return []
    if not isinstance(stop, str | list | tuple | set | frozenset):
        raise ValueError(f"stop must be a string or several, not {type(stop).__name__}")
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        check_text(text)
        if not text:
            raise ValueError("a stop string must not be empty")
    return stops


class Detokenizer:
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
        found = [start for text in self.stop if (start := self._held.find(text)) >= 0]
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
