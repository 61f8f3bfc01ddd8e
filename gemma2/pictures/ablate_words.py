"""What `gemma2 ablate` measured, in words: the report that a page, a picture and the terminal show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.research.ablation import Effect, Estimate, Switches
from gemma2.research.saturation import Near

FEWEST = 10  # windows that intervals need to be worth something
POCKET = (
    "The pocket model cannot show what the final cap does in Google's models. On the real 2B, raw top logits reach 54: "
    "there the cap's slope is 0.10, and taking the cap away changes the predictions much."
)


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        model: its name.
        text: in words: which text, how much of it.
        about: a line for the foot: versions, machine, bootstrap.
        switches: name -> arguments of `ablate`.
        effects: of all contexts; of each, the unchanged model first.
        near: how near the caps are, at the longest context.
        pocket: whether it is the pocket model.
    """

    model: str
    text: str
    about: str
    switches: Switches
    effects: Sequence[Effect]
    near: Sequence[Near]
    pocket: bool

    @property
    def title(self) -> str:
        return f"What each part of {Path(self.model).name} does"

    @property
    def contexts(self) -> list[int]:
        return list(dict.fromkeys(effect.context for effect in self.effects))

    def at(self, context: int) -> dict[str, Effect]:
        return {effect.name: effect for effect in self.effects if effect.context == context}

    @property
    def heads(self) -> dict[tuple[int, int], str]:
        """(layer, head) -> the name of the change that silences this head alone."""
        lone = {name: options["heads"] for name, options in self.switches.items() if set(options) == {"heads"}}
        return {tuple(pairs[0]): name for name, pairs in lone.items() if len(pairs) == 1}

    @property
    def listed(self) -> list[str]:
        """The changes that get a row: all but those of the grid of heads."""
        grid = set(self.heads.values())
        return [name for name in self.switches if name not in grid]


def code(options: Mapping[str, Any]) -> str:
    """The arguments of `ablate` as Python, long lists cut."""
    said = [f"{name}={value!r}" if len(repr(value)) < 40 else f"{name}=[...]" for name, value in options.items()]
    return ", ".join(said)


def interval(found: Estimate, form: str = ".3f") -> str:
    """`3.053 [2.981, 3.127]`, or the value alone where there is no interval."""
    if found.low is None or found.high is None:
        return format(found.value, form)
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def few_windows(effect: Effect) -> str:
    """A warning where a bootstrap has little to draw from, or nothing said."""
    if effect.windows >= FEWEST:
        return ""
    none = "there is no interval" if effect.windows == 1 else "the intervals say little"
    return f"At context {effect.context:,} the text has {windows_of(effect)}: {none}. Give a longer text."


def windows_of(effect: Effect) -> str:
    """How many windows were measured, in words."""
    return f"{effect.windows:,} window{'s' * (effect.windows != 1)}"


def near_rows(found: Sequence[Near]) -> list[tuple[str, ...]]:
    """The table of caps as text, its head first."""
    head = ("values before the cap", "cap", "largest |x|", "above 0.5 cap", "above 0.9 cap", "mean slope")
    lines = [
        (near.name, f"{near.cap:g}", f"{near.largest:.1f}", share(near.half), share(near.most), f"{near.slope:.3f}")
        for near in found
    ]
    return [head, *lines]


def share(x: float) -> str:
    """A share in percent; a very small one is not shown as nothing."""
    return "0" if x == 0 else f"{x:.2%}" if x >= 5e-5 else "< 0.01%"
