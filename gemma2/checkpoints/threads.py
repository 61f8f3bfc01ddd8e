"""Threads that read and compute a checkpoint's tensors, one per core, while all other threads keep their number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch

_STARTING = Lock()  # one pool at a time may have PyTorch's number of threads changed


def settle() -> None:
    """Let PyTorch set up the thread that calls this. Otherwise it would do so at the thread's first computation, which
    another thread's pool may have changed the number for at that moment."""
    with _STARTING:
        torch.get_num_threads()


@contextlib.contextmanager
def one_thread_per_core() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as PyTorch would use here. Each computes alone: chunks are independent and small.

    An error or Ctrl-C ends the work at once, and what has not begun is dropped.
    """
    settle()
    count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "gemma2-load", initializer=_compute_alone)
    try:
        _start(pool, count)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _compute_alone() -> None:
    torch.get_num_threads()  # PyTorch sets a thread up at its first use, which would undo an earlier setting
    torch.set_num_threads(1)


def _start(pool: ThreadPoolExecutor, count: int) -> None:
    """Start all threads of a pool, and put back what that changes for others.

    PyTorch keeps a number of threads for every thread that has computed before, and one number for all threads that
    begin later. `torch.set_num_threads` sets both. The pool's threads keep their own number, so the number for later
    threads is put back as soon as they have started. Only a new thread can read that number, so a new thread does this.
    """
    started = Barrier(count + 1)
    with _STARTING, ThreadPoolExecutor(1) as fresh:
        for_new_threads = fresh.submit(torch.get_num_threads).result()
        try:
            for _ in range(count):
                pool.submit(started.wait)
            started.wait()
        finally:
            started.abort()  # where a thread could not be started, the others wait for it no longer
            fresh.submit(torch.set_num_threads, for_new_threads).result()
