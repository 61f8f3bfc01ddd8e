"""One difference between two implementations' arithmetic: a name, a sentence, a source, and the parts it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemma2.checkpoints.ggml import Scales
from gemma2.model import Gemma2


@dataclass(frozen=True)
class Stored:
    """How a file holds a parameter.

    Attributes:
        kind: ggml's name for the type, as "Q8_0".
        scales: reads what its integers are multiplied with; None if that is not known.
    """

    kind: str
    scales: Callable[[], Scales | None] | None = None


Kinds = Mapping[str, Stored]  # parameter name -> how it is stored


@dataclass(frozen=True)
class Change:
    """One named change. `apply` makes it in a model `in_parts`; any change of a profile can be applied alone."""

    name: str
    about: str
    source: str
    apply: Callable[[Gemma2, Kinds], None]


def replacing(part: type[nn.Module], **functions: Callable[..., Any]) -> Callable[[Gemma2, Kinds], None]:
    """Put functions in the place of a twin's, wherever the model has that twin."""

    def apply(model: Gemma2, kinds: Kinds) -> None:
        for module in model.modules():
            if isinstance(module, part):
                for name, function in functions.items():
                    assert hasattr(module, name), f"{part.__name__} has no part {name}"
                    setattr(module, name, function)

    return apply
