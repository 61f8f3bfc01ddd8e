"""Read GGUF files damaged at random, and end with an error at the first that is neither refused properly nor sound.

    python scripts/fuzz_gguf.py [--runs N] [--seed S] [--jobs J] [--keep FOLDER]
    python scripts/fuzz_gguf.py --atheris [--runs N] [--seed S]

A fault is any exception but BadModelFile, a message of more than one line, a header that contradicts its file, a second
of computing for one file, or a process that grows by 150 MB. The file that shows it stays in the folder. With
--atheris, coverage of the parser steers the damage; that needs `pip install atheris`.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from gemma2.checkpoints import gguf
from tests.hostile.child import MOST_MEMORY as MOST_ADDRESSES
from tests.hostile.child import STATUS, memory
from tests.hostile.gguf_mutations import BASES, MOST_MEMORY, Tally, read, tally

CHUNK = 2000  # files between two looks at the bar and the memory
MOST_SECONDS = 60  # for a chunk that hangs
start = 0  # bytes of this process before its first file


def limit() -> None:
    """Before the first file, so that no process may take the machine's memory."""
    global start
    start = memory("VmRSS")
    if STATUS.exists():
        most = memory("VmSize") + MOST_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def work(first: int, stop: int, folder: Path) -> tuple[Tally, int]:
    """The files of some seeds, and how far this process has grown."""
    signal.alarm(MOST_SECONDS)  # ends the process
    own = folder / str(first)
    own.mkdir(parents=True)
    found = tally(range(first, stop), own)
    (own / "mutated.gguf").unlink()
    own.rmdir()
    signal.alarm(0)
    return found, memory("VmHWM") - start


def fuzz(runs: int, seed: int, jobs: int, folder: Path) -> tuple[Tally, int]:
    """What became of all files, and the most that a process has grown by."""
    found, grown = Tally(), 0
    starts = range(seed, seed + runs, CHUNK)
    with (
        tqdm(total=runs, unit=" files", unit_scale=True) as bar,
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=limit) as pool,
    ):
        chunks = [pool.submit(work, first, min(first + CHUNK, seed + runs), folder) for first in starts]
        try:
            for chunk in as_completed(chunks):
                some, size = chunk.result()
                found, grown = found + some, max(grown, size)
                bar.update(some.accepted + some.refused)
        finally:
            pool.shutdown(cancel_futures=True)
    return found, grown


def steered(runs: int, seed: int, folder: Path) -> None:
    """The same by atheris, which ends the process when it is done or has found a fault."""
    atheris = importlib.import_module("atheris")  # in no list of this project's dependencies
    for function in vars(gguf._Header).values():
        if callable(function):
            atheris.instrument_func(function)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, base in enumerate(BASES):
        (corpus / str(number)).write_bytes(base.write())
    limit()
    options = [f"-runs={runs}", f"-seed={seed + 1}", "-max_len=4096", "-timeout=2", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda raw: read(folder / "input.gguf", raw) and None)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="files [1,000,000]")
    parser.add_argument("--seed", type=int, default=0, help="of the first file; the next has the next [0]")
    parser.add_argument("--jobs", type=int, default=1, help="processes [1]")
    parser.add_argument("--keep", metavar="FOLDER", help="where a file that shows a fault stays [a temporary folder]")
    parser.add_argument("--atheris", action="store_true", help="steer by coverage")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="fuzz-gguf-"))
    if args.atheris:
        steered(args.runs, args.seed, folder)
    began = time.perf_counter()
    found, grown = fuzz(args.runs, args.seed, args.jobs, folder)
    seconds = time.perf_counter() - began
    total = found.accepted + found.refused
    print(
        f"{total:,} files in {seconds:.0f} s ({total / seconds:,.0f} a second): {found.refused:,} refused, "
        f"{found.accepted:,} accepted; slowest {found.slowest * 1000:.0f} ms, at most {grown / 1e6:.0f} MB more memory"
    )
    if args.keep is None:
        folder.rmdir()
    if grown > MOST_MEMORY:
        print(f"fault: a process grew by {grown / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
