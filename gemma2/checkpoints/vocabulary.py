"""Which tokenizer a checkpoint has: the one that was given, or the one in its folder."""

from __future__ import annotations

from pathlib import Path

from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile
from gemma2.tokenizer import Tokenizer


def tokenizer_of(folder: Path, tokenizer: str | Path | Tokenizer | None) -> Tokenizer:
    """The tokenizer that is given, or else the one in a folder."""
    given = parse_tokenizer(tokenizer)
    if given is not None:
        return given
    beside = folder / "tokenizer.model"
    if not beside.is_file():
        raise BadModelFile(f"{beside}: no such file; put the tokenizer.model there or name one with tokenizer=")
    return Tokenizer.from_file(beside)


def parse_tokenizer(tokenizer: str | Path | Tokenizer | None) -> Tokenizer | None:
    """A tokenizer by its path or itself; None for None. Raises BadModelFile where there is no such file."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    path = Path(tokenizer)
    if not path.is_file():
        raise BadModelFile(f"{path}: no such file")
    return Tokenizer.from_file(path)


def check_vocabulary(tokenizer: Tokenizer, config: Gemma2Config) -> None:
    """Raises BadModelFile unless every piece has a row of the embedding, and every row a piece."""
    if len(tokenizer) != config.vocab_size:
        raise BadModelFile(
            f"{tokenizer.where}: {len(tokenizer)} pieces, but the embedding has {config.vocab_size} rows"
        )
