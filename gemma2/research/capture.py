"""Seeing what flows through a model: hooks on named sites, set for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from gemma2.model import Gemma2
from gemma2.research.sites import chosen


@contextmanager
def watching(model: Gemma2, see: Callable[[str, Tensor], None], sites: Iterable[str] | str = "*") -> Iterator[None]:
    """Call `see(name, value)` for every chosen site of every pass inside the block, in the order of computation.

    The value is the model's own tensor, part of the graph: copy or detach what is kept.

    Raises:
        ValueError: a pattern that names no site.
    """
    by_module: dict[str, list[str]] = {}
    for name, site in chosen(model.config, sites).items():
        by_module.setdefault(site.module, []).append(name)
    with ExitStack() as hooks:
        for path, names in by_module.items():
            handle = model.get_submodule(path).register_forward_hook(_teller(see, names))
            hooks.callback(handle.remove)
        yield


@contextmanager
def capture(model: Gemma2, sites: Iterable[str] | str = "*") -> Iterator[dict[str, Tensor]]:
    """A dict that fills with the detached values of the last pass inside the block: site -> tensor.

    with capture(model, "blocks.*.hook_resid_post") as seen:
        model(tokens)
    """
    seen: dict[str, Tensor] = {}
    with watching(model, lambda name, value: seen.__setitem__(name, value.detach()), sites):
        yield seen


def _teller(see: Callable[[str, Tensor], None], names: list[str]) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        for name in names:
            see(name, output)

    return hook
