"""A stand-in for Apple's MPS device on the CPU: it has the name of the device, its operations and its dtypes, and the
CPU's arithmetic.

Tensors "on mps" are `OnMps`, around a tensor of the CPU. What they are given to is refused as MPS refuses it:
- float64 and complex values: MPS has neither;
- an operation without a kernel for MPS: `native_functions.yaml`, from which PyTorch is built and which is part of it,
  lists the kernels of every operation;
- tensors of two devices in one operation, but for numbers (no axes) and copies.
Tensors that stay on the CPU on purpose (of files, frequencies, results) are free to be what they like.

What this cannot show: MPS's arithmetic, its limits of size, its speed, a kernel that is listed and refuses some dtype,
and what happens inside an operation that PyTorch composes in C++
(CompositeExplicitAutograd): the operations in it are not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NATIVE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
MPS, CPU = torch.device("mps", 0), torch.device("cpu")
WIDE = (torch.float64, torch.complex64, torch.complex128, torch.complex32)
# Works on every device: a composition of other operations, or one that only looks at the tensor's description.
ANYWHERE = {
    "MPS",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
}
COPIES = ("aten::copy_", "aten::_to_copy")


@cache
def kernels() -> dict[str, set[str]]:
    """Operation, as "aten::cumsum" or "aten::add.Tensor" -> the dispatch keys that have a kernel for it."""
    entries = yaml.load(NATIVE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    named = {entry["func"].partition("(")[0].strip(): entry for entry in entries}

    def keys(entry: dict[str, Any]) -> set[str]:
        if "structured_delegate" in entry:  # it has the kernels of its out= form
            return keys(named[entry["structured_delegate"]]) | _keys(entry)
        return _keys(entry) or {"CompositeImplicitAutograd"}

    return {f"aten::{name}": keys(entry) for name, entry in named.items()}


def _keys(entry: dict[str, Any]) -> set[str]:
    return {key.strip() for listed in entry.get("dispatch", {}) for key in listed.split(",")}


def runs_on_mps(operation: str) -> bool:
    return bool(kernels().get(operation, set()) & ANYWHERE)


class OnMps(Tensor):
    """A tensor that says that it is on MPS. Its values are in `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnMps:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("meta"),  # to C++, which would ask for a driver of MPS
        )

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    device = property(lambda self: MPS)
    is_meta = property(lambda self: False)
    is_mps = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Inside, tensors can be made on MPS. `seen` are the operations that ran there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = any(isinstance(x, OnMps) for x in tree_flatten((args, kwargs))[0])
        if not here and torch.device(kwargs.get("device") or "cpu").type != "mps":
            return func(*args, **kwargs)
        self.seen.add(func.name())
        return _run(func, args, kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.name()
    if not runs_on_mps(name):
        raise NotImplementedError(f"the operator {name} has no kernel for the MPS device")
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    strangers = [x for x in given if not isinstance(x, OnMps) and x.ndim]
    if strangers and name not in COPIES and len(strangers) < len(given):
        raise RuntimeError(f"{name}: tensors of {strangers[0].device} and of mps")
    inner = tree_map(lambda x: x.held if isinstance(x, OnMps) else x, (args, dict(kwargs)))
    wanted = torch.device(kwargs.get("device") or "mps")
    if "device" in inner[1]:
        inner[1]["device"] = CPU
    for x in given:
        if isinstance(x, OnMps) and x.dtype in WIDE:
            raise TypeError(f"{name}: MPS does not have {x.dtype}")
    results = func(*inner[0], **inner[1])
    if name == "aten::copy_" and not isinstance(args[0], OnMps):
        return args[0]  # from MPS into a tensor of the CPU
    written = {id(x.held): x for x in given if isinstance(x, OnMps)}  # operations in place return what they are given

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or wanted.type == "cpu":
            return x
        if x.dtype in WIDE:
            raise TypeError(f"{name}: MPS does not have {x.dtype}")
        return written[id(x)] if id(x) in written else OnMps(x)

    return tree_map(placed, results)


def _numbered(x: Any) -> Any:
    return MPS if isinstance(x, str | torch.device) and str(x) == "mps" else x


class _Python(TorchFunctionMode):
    """What PyTorch does in C++ before its operations, by the device that it takes these tensors for: `.to("mps")` asks
    the system for the number of the device, `tolist` is for its own tensors, and a number is assigned as a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_numbered, (args, kwargs or {}))
        if args and isinstance(args[0], OnMps):
            if func is Tensor.tolist:
                return args[0].cpu().tolist()
            if func is Tensor.__setitem__:
                where = args[1] if isinstance(args[1], tuple) else (args[1],)
                if any(isinstance(part, Tensor) for part in where):
                    return args[0].index_put_(where, args[2])
                place = args[0][args[1]]
                return place.copy_(args[2]) if isinstance(args[2], Tensor) else place.fill_(args[2])
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """Made for MPS, it draws as the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


@contextlib.contextmanager
def stand_in(monkeypatch: Any, threads: Callable[[], None]) -> Iterator[StandIn]:
    """Inside, this machine has MPS.

    Args:
        threads: what threads that load a model begin with; they stand on MPS too.
    """
    from gemma2.checkpoints import threads as pool

    mode = StandIn()

    def begin() -> None:
        threads()
        mode.__enter__()  # a mode is one thread's; it ends with it

    monkeypatch.setattr(pool, "_compute_alone", begin)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10**10)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    monkeypatch.setattr(torch, "Generator", _Generator)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) moves by an operation that is seen
    try:
        with mode, _Python():
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
