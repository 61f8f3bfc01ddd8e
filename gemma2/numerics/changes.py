"""One difference between two implementations' arithmetic: a name, a sentence, a source, the functions it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemma2.checkpoints.ggml import Scales


@dataclass(frozen=True)
class Stored:
    """How a file holds a parameter.

    Attributes:
        type: ggml's name for the type, as "Q8_0".
        scales: reads what its integers are multiplied with; None if that is not known.
    """

    type: str
    scales: Callable[[], Scales | None] | None = None


Storage = Mapping[str, Stored]  # parameter name -> how a file holds it
Apply = Callable[[str, nn.Module, Storage], None]  # a part's path, the part, and how parameters are stored


@dataclass(frozen=True)
class Change:
    """One named change. `apply` makes it in a part of the model (see `parts`) that it concerns, and leaves the others;
    any change of a profile can be applied alone."""

    name: str
    about: str
    source: str
    apply: Apply


def replacing(part: type[nn.Module], **functions: Callable[..., Any]) -> Apply:
    """Put functions in the place of a part's own, in all parts of this class."""

    def apply(path: str, module: nn.Module, storage: Storage) -> None:
        if isinstance(module, part):
            for name, function in functions.items():
                assert hasattr(module, name), f"{part.__name__} has no function {name}"
                setattr(module, name, function)

    return apply
