"""Loads and conversions in several threads leave PyTorch's number of threads as it was: in the process, in threads that
begin later, and in the threads that loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SETUP = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
import gemma2

def fresh():  # what a thread computes with that begins now
    with ThreadPoolExecutor(1) as one:
        return one.submit(torch.get_num_threads).result()

torch.get_num_threads()  # the first use sets this thread up
torch.set_num_threads(4)
place = Path(sys.argv[1])

def load(number):
    gemma2.load(progress=False)

def convert(number):
    gemma2.convert(None, place / f"{time.monotonic_ns()}.gguf", type="q8_0", progress=False)

def fail(number):
    if number % 2:
        return load(number)
    try:
        gemma2.load(place / "nan", progress=False)
    except gemma2.BadModelFile as error:
        assert "hold NaN" in str(error)
    else:
        raise AssertionError("loaded")

def at_once(work):
    counts, errors = [], []
    def one(number):
        time.sleep(0.004 * number)  # so that one begins while another is at work
        try:
            work(number)
            counts.append(torch.get_num_threads())
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(errors, counts, torch.get_num_threads(), fresh())
"""


BROKEN = """
from safetensors.torch import save_file
gemma = gemma2.load(progress=False)
gemma.model.get_parameter("model.layers.5.mlp.up_proj.weight").data[3, 5] = torch.nan
gemma2.convert(None, place / "nan", progress=False)
save_file({name: value.clone() for name, value in gemma.model.state_dict().items()}, place / "nan/model.safetensors")
"""


def test_three_at_once_leave_every_number_of_threads_as_it_was(tmp_path: Path) -> None:
    """Loads, conversions, and loads of which some fail."""
    script = SETUP + BROKEN + "for work in [load] * 4 + [convert] * 2 + [fail] * 3:\n    at_once(work)\n"
    assert said(script, tmp_path) == "[] [4, 4, 4] 4 4\n" * 9


WHILE_ANOTHER_STARTS = """
from gemma2.checkpoints import threads
def work():
    gemma2.load(progress=False)
    return torch.get_num_threads()
with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as loading, ThreadPoolExecutor(1) as other:
    with threads._STARTING:  # as while another load starts its pool
        pool.submit(threads._compute_alone).result()  # the number for new threads is 1 now
        count = loading.submit(work)
        time.sleep(0.3)
        other.submit(torch.set_num_threads, 4).result()
    print(count.result())
"""


def test_a_thread_that_loads_first_while_another_load_starts_keeps_its_number(tmp_path: Path) -> None:
    assert said(SETUP + WHILE_ANOTHER_STARTS, tmp_path) == "4\n"


def said(script: str, place: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", script, str(place)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
