"""The one way to put another module in a named place, and to take it out again.

A twin stands for a module: it takes the same inputs, and keeps the names of the parameters and taps inside it. Numerics
profiles, faster kernels, quantized and LoRA linears are twins; so is a deliberate mistake in a test.

    with replaced(model, on(nn.Linear, Int8Linear)) as twin:
        twin(tokens)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from gemma2.config import Gemma2Config
from gemma2.model import Gemma2, Tap

M = TypeVar("M", bound=nn.Module)
Make = Callable[[str, nn.Module], nn.Module | None]  # a module's path and the module -> its twin, or None to leave it


class replaced(Generic[M]):  # noqa: N801  (it is used as a function)
    """Put `make(path, module)` where it gives a twin. `restore()`, or the end of a `with`, puts back what was there.

    Modules are asked for from the outermost inwards; what is inside a replaced module is not asked for.

    Args:
        model: changed in place, and given by the `with`. It stays the same object.
        make: see `on` for the usual one.
    Attributes:
        twins: path -> the twin that stands there.
    Raises:
        ValueError: no module was replaced; or a twin has lost a tap without saying so: it lists the names of those that
            it cannot show in an attribute `hides`. The model is as it was then.
    """

    def __init__(self, model: M, make: Make) -> None:
        self.model: M = model
        self.twins: dict[str, nn.Module] = {}
        self._old: dict[str, nn.Module] = {}
        try:
            for path, module in list(model.named_modules()):
                if not path or any(path.startswith(f"{done}.") for done in self._old):
                    continue
                twin = make(path, module)
                if twin is not None:
                    _check_taps(path, module, twin)
                    self._old[path], self.twins[path] = module, twin
                    model.set_submodule(path, twin.train(module.training))
            if not self._old:
                raise ValueError("nothing was replaced: there is no module that this twin stands for")
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put back the modules that were replaced.

        Raises:
            RuntimeError: something else was put in one of these places since, and must be taken out first.
        """
        for path, twin in self.twins.items():
            if self.model.get_submodule(path) is not twin:
                raise RuntimeError(f"{path} was replaced once more since: restore() that first")
        for path, module in self._old.items():
            self.model.set_submodule(path, module)
        self._old, self.twins = {}, {}

    def __enter__(self) -> M:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.restore()


def on(kind: type[nn.Module], twin: Callable[[Any], nn.Module]) -> Make:
    """`twin(module)` for every module of exactly this class."""
    return lambda path, module: twin(module) if type(module) is kind else None


def sharing(model: Gemma2, config: Gemma2Config | None = None) -> Gemma2:
    """A new model with the parameters of `model` itself, not copies, and none of its hooks.

    A twin that holds its weights in a form of its own gives another that shares them, by its method `shared`.

    Args:
        config: of the new model, as with another window; default the model's own. Parameters keep their shapes.
    Raises:
        ValueError: modules of `model` were replaced by ones with other parameters.
    """
    config = config or model.config
    held = {path: module for path, module in model.named_modules() if hasattr(module, "shared")}
    inside = tuple(f"{path}." for path in held)
    parameters = dict(model.named_parameters())
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    with torch.device("meta"):
        new = Gemma2(config)
    for path, module in held.items():
        new.set_submodule(path, module.shared())
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(inside)}
    try:
        new.load_state_dict(buffers | parameters, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"these are not a Gemma 2's own parameters: {' '.join(str(error).split())[:300]}") from None
    for parameter in frozen:  # which loading would thaw, here and in `model`: they are the same
        parameter.requires_grad_(False)
    new.model.rotary_emb.to(model.device)
    return new.train(model.training)


def hidden_by(model: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """Where `path` leads to no module because a twin hides it: the twin's path and the twin. Else None."""
    module, names = model, path.split(".")
    for depth, name in enumerate(names):
        child = module._modules.get(name)
        if child is None:
            hides = ".".join(names[depth:]) in getattr(module, "hides", ())
            return (".".join(names[:depth]), module) if hides else None
        module = child
    return None


def _check_taps(path: str, module: nn.Module, twin: nn.Module) -> None:
    lost = _taps(module) - _taps(twin) - set(getattr(twin, "hides", ()))
    if lost:
        raise ValueError(
            f"{path}: the twin {type(twin).__name__} has no {sorted(lost)[0]}; keep it, or name it in `hides`"
        )


def _taps(module: nn.Module) -> set[str]:
    return {name for name, inner in module.named_modules() if name and isinstance(inner, Tap)}
