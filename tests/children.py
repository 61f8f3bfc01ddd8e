"""Children that get signals as a command in a terminal gets them, whoever started the tests.

A process hands the signals that it ignores or blocks on to its children, and a script may well ignore some:
`sh -c 'trap "" INT; make test'`, or `make test &` in a script.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SENT = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM) if hasattr(signal, "SIGALRM") else (signal.SIGINT,)


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """A child that is started in here meets every signal that tests send or set a timer for in its default way.

    A handler of Python's does it: only what is ignored is handed on to another program. (`preexec_fn` is not safe in a
    process with threads.) Popen itself restores SIGPIPE and SIGXFSZ, which Python ignores.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in SENT}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
