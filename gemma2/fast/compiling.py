"""How the faster parts are compiled, and what is done where nothing can be compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from gemma2.checkpoints.weights import hidden
from gemma2.errors import first_line

F = TypeVar("F", bound=Callable[..., Any])
MOST_GRAPHS = 64  # of one function: a model has some ten shapes of matrices, and a few counts of rows
NEVER = 10**6
# A sum of 32 products stays one expression, where Inductor would otherwise store it in pieces; and a product that is
# added to something is one instruction.
OPTIONS: dict[str, Any] = {
    "realize_acc_reads_threshold": NEVER,
    "realize_opcount_threshold": NEVER,
    "realize_reads_threshold": NEVER,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def no_compiler(device: torch.device) -> str | None:
    """A line that says why nothing can be compiled for a device, or None where it can."""
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, or whatever the search for one brings
        return f"nothing is compiled: there is no C++ compiler here ({first_line(error)}); install g++ or clang++"
    return None


class Notice:
    """A line on standard error while PyTorch compiles."""

    def __init__(self) -> None:
        self.progress: bool | None = False
        self._line: tqdm[Any] | None = None

    def begin(self, *_: Any) -> None:
        self._line = tqdm(desc="compiling", bar_format="{desc}", leave=False, disable=hidden(self.progress))

    def end(self, *_: Any) -> None:
        if self._line is not None:
            self._line.close()


NOTICE = Notice()


def show_compiling(progress: bool | None = None) -> None:
    """From now on, say so while PyTorch compiles anything; None says it on a terminal only."""
    from torch._dynamo.callback import callback_handler

    NOTICE.progress = progress
    if NOTICE.begin not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(NOTICE.begin)
        callback_handler.register_end_callback(NOTICE.end)


@functools.cache
def can_compile() -> bool:
    """Whether there is a C++ compiler for loops on a CPU."""
    return no_compiler(torch.device("cpu")) is None


def compiled(function: F) -> F:
    """`function` compiled by Inductor, for products on a CPU. Every shape has a graph of its own.

    It stays compiled while everything else is forced to run eagerly, as for hooks: there are none inside it, and its
    expressions take a hundred times as long one by one.
    """
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": MOST_GRAPHS} if known else {}
    made = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS, **limit)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch._dynamo.eval_frame._stance.stance != "force_eager":
            return made(*args, **kwargs)
        with torch.compiler.set_stance("default"):
            return made(*args, **kwargs)

    return cast(F, call)


def kernel(function: F) -> F:
    """A function that is compiled at its first call, or becomes a part of the graph that is being compiled: one part
    for all calls with equal shapes, which saves a third of the compiler's time.

    Without a compiler it runs as it is.
    """
    own: list[F] = []
    part = torch.compiler.nested_compile_region(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return part(*args, **kwargs)
        if not can_compile():
            return function(*args, **kwargs)
        if not own:
            own.append(compiled(function))
        return own[0](*args, **kwargs)

    return cast(F, call)


def stored(x: Tensor) -> Tensor:
    """`x` itself, computed before it is read: Inductor would otherwise compute it anew for every row of a matrix."""
    return x.as_strided(x.shape, x.stride())


def tree(terms: list[Tensor], chains: int) -> Tensor:
    """The sum of terms in several running sums, which do not wait for each other, and a tree over those."""
    sums = terms[:chains]
    for i, term in enumerate(terms[chains:]):
        sums[i % chains] = sums[i % chains] + term
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)] + sums[len(sums) & ~1 :]
    return sums[0]
