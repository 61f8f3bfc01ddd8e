"""How the faster parts are compiled, and what is done where nothing can be compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

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


def compiled(function: F, *, dynamic: bool = False) -> F:
    """`function` compiled by Inductor, for products on a CPU.

    Args:
        dynamic: one graph serves all shapes. Otherwise each has its own, which is faster.
    """
    limit = {"recompile_limit": MOST_GRAPHS} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=OPTIONS, **limit)  # type: ignore[return-value]


def kernel(*, dynamic: bool = False) -> Callable[[F], F]:
    """For a function that is compiled at its first call, or becomes a part of the graph that is being compiled."""

    def decorate(function: F) -> F:
        own: list[F] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if not own:
                own.append(compiled(function, dynamic=dynamic))
            return own[0](*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


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
