"""A lens with a map for each site: it carries a value to where the final norm reads, then the logit lens reads it.

`fit_jacobian` and `fit_tuned` make one. It is saved as a safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemma2 import ops
from gemma2.atomic import check_target, naming_a_full_disk, replacing
from gemma2.errors import BadModelFile
from gemma2.model import Gemma2
from gemma2.research.marks import difference, marks_of
from gemma2.research.sites import in_table

KINDS = ("jacobian", "tuned")
KIND = "gemma2_lens"  # its key in the file's metadata
WEIGHT, BIAS = ".weight", ".bias"
MARKS = {"marks.embedding": "embedding", "marks.norms": "norms"}


@dataclass(frozen=True)
class FittedLens:
    """value -> weight @ value + bias, for each site.

    Attributes:
        kind: "jacobian" or "tuned".
        weights: site -> [d d], the row is the coordinate after the map.
        biases: site -> [d]; a Jacobian lens has none.
        about: what it was fitted on, for people: text to text.
        marks: of the model that it was fitted on, see `gemma2.research.marks`. A lens of one's own making may have
            none, and is then taken for any model of its width.
    """

    kind: str
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, Tensor] = field(default_factory=dict)

    def carry(self, name: str, value: Tensor) -> Tensor:
        """A value [... d] of a site, carried to the last layer. It is computed in float32, or float64 for float64, and
        has the value's dtype."""
        self.check([name], value.shape[-1])
        wide = ops.upcast(value)
        carried = wide @ self.weights[name].to(wide).T
        if name in self.biases:
            carried = carried + self.biases[name].to(wide)
        return carried.to(value.dtype)

    def check(self, names: Iterable[str], width: int) -> None:
        """Raises ValueError for a site that it has no map for, and for a model of another width."""
        for name in names:
            if name not in self.weights:
                known = list(self.weights)
                raise ValueError(f"this lens has no map for {name}; it has {known[0]} to {known[-1]}")
            own = self.weights[name].shape[-1]
            if own != width:
                raise ValueError(f"this lens is for a model of width {own}, not {width}")

    def check_model(self, names: Iterable[str], model: Gemma2) -> None:
        """As `check`, and raises ValueError for a model whose weights show that it is not the one of the fit. Another
        dtype, or a quantized form of the same weights, is taken."""
        self.check(names, model.config.hidden_size)
        found = difference(marks_of(model), self.marks) if self.marks else None
        if found is not None:
            raise ValueError(
                f"this lens was fitted on another model than this: {found}. To use it all the same, give "
                "dataclasses.replace(lens, marks={})"
            )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write it as a safetensors file, in float32, whole or not at all. Raises OSError; FileExistsError unless
        `force`."""
        target = Path(path).expanduser()
        check_target(target, force=force)
        tensors = {f"{name}{WEIGHT}": weight for name, weight in self.weights.items()}
        tensors |= {f"{name}{BIAS}": bias for name, bias in self.biases.items()}
        tensors |= {name: self.marks[mark] for name, mark in MARKS.items() if mark in self.marks}
        whole = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(target) as (partial,), naming_a_full_disk(target):
            save_file(whole, partial, {KIND: self.kind, **self.about})


def open_lens(path: str | Path) -> FittedLens:
    """A lens from its file.

    Raises:
        BadModelFile: the file is missing, is no safetensors file, or holds something else; says what.
    """
    target = Path(path).expanduser()
    try:
        with safe_open(target, "pt") as file:
            about = dict(sorted((file.metadata() or {}).items()))  # a file has them in any order
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it has no __iter__)
    except FileNotFoundError:
        raise BadModelFile(f"{target}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise BadModelFile(f"{target}: not a whole safetensors file ({error})") from None
    kind = about.pop(KIND, None)
    if kind not in KINDS:
        raise BadModelFile(f"{target}: not a lens: its metadata has no {KIND}, which is {' or '.join(KINDS)}")
    weights, biases, marks = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        site, dot, part = name.rpartition(".")
        into = {WEIGHT: weights, BIAS: biases}.get(dot + part, marks)
        if name not in MARKS and (into is marks or not _is_stream(site)):
            raise BadModelFile(f"{target}: {name} is neither {WEIGHT} nor {BIAS} of a site of the residual stream")
        if not bool(tensor.isfinite().all()):
            raise BadModelFile(f"{target}: {name} holds NaN or infinity")
        into[MARKS.get(name, site)] = tensor
    widths = {size for weight in weights.values() for size in weight.shape}
    widths |= {bias.numel() for bias in biases.values()}
    square = all(weight.ndim == 2 for weight in weights.values()) and all(bias.ndim == 1 for bias in biases.values())
    if len(widths) != 1 or not square or biases.keys() - weights.keys():
        raise BadModelFile(f"{target}: the maps are not all [d d], and biases [d], of one width d")
    if len(marks) not in (0, len(MARKS)):
        raise BadModelFile(f"{target}: of {' and '.join(MARKS)} one is missing")
    return FittedLens(kind, _ordered(weights), _ordered(biases), about, marks)


def _is_stream(name: str) -> bool:
    try:
        return in_table(name).shape == "b t d"
    except KeyError:
        return False


def _ordered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the order of layers: a file may have another."""

    def place(name: str) -> tuple[int, str]:
        parts = name.split(".")
        return (int(parts[1]) if parts[0] == "blocks" else -1, name)

    return {name: tensors[name] for name in sorted(tensors, key=place)}
