"""pytorch_model.bin that must not load: nothing in it runs, and nothing it claims costs memory or time."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.checkpoints.folder import PICKLED, PICKLED_INDEX
from gemma2.checkpoints.safetensors import INDEX
from tests.conftest import tensors_of, tiny
from tests.hostile.child import attempts, complaints, in_a_child
from tests.hostile.conftest import SMALL, shell

State = dict[Any, Any]
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
HEAVY = "a tuple of 3.3e+12 values in its pickle"
CODE = "holds more than tensors, so it is not read: a pickle can run code"
NOT, STATE = "not a PyTorch checkpoint (", "no model_state_dict of tensors in it"
PLAIN = "without a name or without plain values: "


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    return tensors_of(tiny(vocab_size=4096, **SMALL))


def saved(content: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def refused_in_a_child(folder: Path, cases: dict[str, tuple[bytes, str]], name: str = PICKLED) -> dict[str, list[str]]:
    """The cases that are not refused with their words, in one line, at once and at little cost."""
    folder.mkdir(exist_ok=True)
    places = [shell(folder / str(number)) for number in range(len(cases))]
    for place, (content, _) in zip(places, cases.values(), strict=True):
        (place / name).write_bytes(content)
    found = in_a_child(attempts, [str(place) for place in places])
    short = {
        case: complaints(attempt, place / name, words)
        for (case, (_, words)), place, attempt in zip(cases.items(), places, found, strict=True)
    }
    return {case: said for case, said in short.items() if said}


# Code. Each object, once unpickled by anything that allows it, makes the file `marker`.


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def touching(marker: Path) -> dict[str, Any]:
    shout = f"touch {marker}"
    return {
        "os.system": Calls(os.system, shout),
        "builtins.eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "getattr of a module": Calls(Calls, os.system, shout),
        "torch.load of another pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, shout))),
    }


def places(bomb: Any, good: State) -> dict[str, Any]:
    hooked = torch.ones(8)
    hooked.note = bomb  # type: ignore[attr-defined]  # torch pickles a tensor's own attributes
    return {
        "alone": bomb,
        "in the state": {**good, "x": bomb},
        "as a key": {**good, bomb: torch.ones(1)},
        "nested": {**good, "x": [OrderedDict(y=(bomb,))]},
        "as an attribute": {**good, NORM: hooked},
        "beside the state": {"state_dict": good, "callbacks": bomb},
    }


def test_no_pickle_runs_what_it_calls(tmp_path: Path, good: State) -> None:
    marker = tmp_path / "ran"
    cases: dict[str, tuple[bytes, str]] = {}
    for kind, bomb in touching(marker).items():
        for where, content in places(bomb, good).items():
            if where == "in the state" or kind == "os.system":
                cases[f"{kind}, {where}"] = (saved(content), CODE)
        cases[f"{kind}, legacy"] = (saved({**good, "x": bomb}, legacy=True), CODE)
    for case, (content, _) in cases.items():
        if "getattr" not in case:
            torch.load(io.BytesIO(content), weights_only=False)
            assert marker.exists(), f"{case} must work, or this test shows nothing"
            marker.unlink()
    assert refused_in_a_child(tmp_path, cases) == {}
    assert not marker.exists()


# Files.


def rezipped(whole: bytes, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with each entry's bytes changed; None leaves it out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(out, "w", method) as target:
        for entry in source.namelist():
            if (content := change(entry, source.read(entry))) is not None:
                target.writestr(entry, content)
    return out.getvalue()


def claiming(whole: bytes, ending: str, size: int) -> bytes:
    """The archive whose directory states another size for an entry."""
    at = whole.index(b"PK\1\2")
    while not whole[at + 46 :].startswith(name := next(n for n in zipfile.ZipFile(io.BytesIO(whole)).namelist()
                                                       if n.endswith(ending)).encode()):  # fmt: skip
        at = whole.index(b"PK\1\2", at + 4)
    assert name
    return whole[: at + 20] + struct.pack("<II", size, size) + whole[at + 28 :]


def with_pickle(whole: bytes, content: bytes) -> bytes:
    return rezipped(whole, lambda name, old: content if name.endswith("data.pkl") else old)


def many_entries(count: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        for number in range(count):
            archive.writestr(str(number), b"")
    return out.getvalue()


# A state with one name: a tuple of the same tuple twice, 40 deep.
TUPLES = b"\x80\x02}K\1\x85q\0" + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(40)) + b"K\1s."


def state_in(legacy: bytes) -> int:
    """Where the state begins in a file of the older form: after three small pickles."""
    stream = io.BytesIO(legacy)
    for _ in range(3):
        pickle.load(stream)
    return stream.tell()


@pytest.mark.long
def test_files_that_are_damaged_or_claim_too_much_are_refused_at_little_cost(tmp_path: Path, good: State) -> None:
    whole, legacy = saved(good), saved(good, legacy=True)
    laughs = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%c%se" % (n + 1, n, b"h%c" % n * 9) for n in range(60)) + b"."
    cases: dict[str, tuple[bytes, str]] = {
        "cut in half": (whole[: len(whole) // 2], NOT),
        "cut in its directory": (whole[:-30], NOT),
        "cut in the first header": (whole[:25], NOT),
        "legacy, cut in the pickle": (legacy[:600], NOT),
        "legacy, cut in the values": (legacy[:-100], NOT),
        "a compressed pickle that unpacks to 200 MB": (
            rezipped(whole, lambda n, old: bytes(2 * 10**8) if n.endswith("data.pkl") else None, zipfile.ZIP_DEFLATED),
            NOT,
        ),
        "compressed values": (
            rezipped(whole, lambda n, old: old, zipfile.ZIP_DEFLATED),
            "in it is compressed",
        ),
        "a pickle said to be 4 GB": (claiming(whole, "data.pkl", 2**32 - 2), NOT),
        "values said to be 4 GB": (claiming(whole, "data/0", 2**32 - 2), NOT),
        "shorter values than the pickle says": (
            rezipped(whole, lambda n, old: old[:8] if n.endswith("data/1") else old),
            "its tensors reach beyond the bytes stored for them",
        ),
        "no values": (rezipped(whole, lambda n, old: None if "/data/" in n else old), NOT),
        "20,000 records": (many_entries(20_000), NOT),
        "a pickle of 5 MB": (with_pickle(whole, b"\x80\x02" + b"N0" * 2_600_000 + b"."), NOT),
        "an unknown byte order": (rezipped(whole, lambda n, old: b"middle" if n.endswith("byteorder") else old), NOT),
        "a pickle of a TorchScript": (rezipped(whole, lambda n, old: old if n.endswith("data.pkl") else b""), NOT),
        "lists in lists, 10^60 in all": (with_pickle(whole, laughs), STATE),
        "a name of tuples, 10^12 in all": (with_pickle(whole, TUPLES), HEAVY),
        "a name of tuples, in the older form": (
            legacy[: state_in(legacy)] + TUPLES,
            HEAVY,
        ),
        "a persistent id of nothing": (with_pickle(whole, b"\x80\x02NQ."), CODE),
        "a persistent id of another kind": (with_pickle(whole, b"\x80\x02(X\1\0\0\0xK\1K\1K\1K\1tQ."), CODE),
        "a memo that is not there": (with_pickle(whole, b"\x80\x02h\x07."), NOT),
        "legacy, of another magic": (b"\x80\x02K\x01.\x80\x02K\x01.", NOT),
        "NumPy's reconstruct": (saved({**good, "x": np.ones(3)}), CODE),
        "NumPy's scalar": (saved({**good, "x": np.float64(1)}), CODE),
    }
    assert refused_in_a_child(tmp_path, cases) == {}


# States.


def rebuilt(values: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Calls:
    """What torch.save writes for a tensor, with numbers of our own."""
    rebuild = torch._utils._rebuild_tensor_v2
    return Calls(rebuild, torch.storage.TypedStorage(wrap_storage=values.untyped_storage(), dtype=values.dtype,
                 _internal=True), offset, size, stride, False, OrderedDict())  # fmt: skip


def test_states_of_wrong_things_are_refused_by_name(tmp_path: Path, good: State) -> None:
    circle: State = dict(good)
    circle["x"] = circle
    ring: list[Any] = []
    ring.append(ring)
    beyond, values = {}, torch.ones(8)
    for case, numbers in {
        "a view beyond its memory": (0, (16,), (1,)),
        "a view that begins behind its memory": (9, (8,), (1,)),
        "a view of a negative offset": (-1, (8,), (1,)),
        "a view of a negative stride": (7, (8,), (-1,)),
        "a view of 2^62 values": (0, (2**62,), (1,)),
        "a view whose size overflows": (0, (2**40, 2**40), (1, 1)),
    }.items():
        beyond[case] = (saved({**good, NORM: rebuilt(values, *numbers)}), NOT)
    quantized = torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8)
    cases: dict[str, tuple[bytes, str]] = {
        **beyond,
        "one value seen 2^40 times": (saved({**good, NORM: rebuilt(values, 0, (2**40,), (0,))}), "1 misshapen: "),
        "a circle of dicts": (saved(circle), f"{STATE}: 'x' is of type dict"),
        "a circle of lists": (saved(ring), STATE),
        "a list": (saved(list(good.values())), STATE),
        "a tensor": (saved(good[NORM]), STATE),
        "a number": (saved(7), STATE),
        "text": (saved("weights"), STATE),
        "nothing": (saved(None), STATE),
        "a number among tensors": (saved({**good, "step": 7}), f"{STATE}: 'step' is of type int"),
        "None among tensors": (saved({**good, NORM: None}), f"{STATE}: '{NORM}' is of type NoneType"),
        "a state inside a state": (saved({"state_dict": {"state_dict": good}}), f"{STATE}: 'state_dict' is of type"),
        "a number for a name": (saved({**good, 7: torch.ones(1)}), f"1 tensors {PLAIN}7"),
        "a number of 30 digits for a name": (saved({**good, 10**30: torch.ones(1)}), f"{PLAIN}one of type int"),
        "a tuple for a name": (saved({**good, ("a", "b"): torch.ones(1)}), f"{PLAIN}one of type tuple"),
        "bytes for a name": (saved({**good, b"x": torch.ones(1)}), f"{PLAIN}one of type bytes"),
        "a name of a million letters": (saved({**good, "x" * 10**6: torch.ones(1)}), "1 unknown: xxxx"),
        "sparse": (saved({**good, NORM: good[NORM].to_sparse()}), f"{PLAIN}'{NORM}'"),
        "sparse by rows": (saved({**good, UP: good[UP].to_sparse_csr()}), f"{PLAIN}'{UP}'"),
        "quantized by PyTorch": (saved({**good, NORM: quantized}), f"{PLAIN}'{NORM}'"),
        "without values": (saved({**good, NORM: good[NORM].to("meta")}), f"{PLAIN}'{NORM}'"),
        "complex": (saved({**good, NORM: good[NORM].to(torch.complex64)}), f"{NORM} (complex64)"),
        "integers": (saved({**good, NORM: good[NORM].int()}), f"{NORM} (int32)"),
        "NaN": (saved({**good, NORM: good[NORM] * float("nan")}), f"NaN or infinity in float32: {NORM} (8)"),
    }
    assert refused_in_a_child(tmp_path, cases) == {}


def test_views_that_overlap_inside_their_memory_are_what_they_show(tmp_path: Path, good: State) -> None:
    place = shell(tmp_path / "model")
    (place / PICKLED).write_bytes(saved({**good, NORM: rebuilt(torch.full((1,), 0.5), 0, (8,), (0,))}))
    assert torch.equal(gemma2.load(place, device="cpu").model.state_dict()[NORM], torch.full((8,), 0.5))


# Indexes, each in a folder with nothing else.


@pytest.mark.long
def test_indexes_that_lie_or_reach_elsewhere_are_refused_at_little_cost(tmp_path: Path) -> None:
    assert refused_in_a_child(tmp_path / "safetensors", indexes(".safetensors"), INDEX) == {}
    assert refused_in_a_child(tmp_path / "bin", indexes(".bin"), PICKLED_INDEX) == {}


def indexes(ending: str) -> dict[str, tuple[bytes, str]]:
    plain, no_map = f"is not a plain {ending} file name", "no weight_map from tensor names to file names"
    missing = "shards missing: "

    def mapped(file: object) -> bytes:
        return json.dumps({"weight_map": {NORM: file}}).encode()

    twice = json.dumps({"weight_map": {NORM: f"a{ending}"}}).encode()
    return {
        "a number": (b"7", no_map),
        "a map of numbers": (mapped(7), no_map),
        "a map of lists": (mapped([f"a{ending}"]), no_map),
        "a map that is a list": (b'{"weight_map": []}', no_map),
        "upwards": (mapped(f"../a{ending}"), plain),
        "absolute": (mapped(f"/etc/a{ending}"), plain),
        "NUL": (mapped(f"a\0{ending}"), plain),
        "a tensor twice, the second time upwards": (
            twice.replace(b"}}", b', "%s": "../b"}}' % NORM.encode()),
            plain,
        ),
        "a name of a million letters": (mapped("x" * 10**6), plain),
        "a name longer than names of files": (mapped("x" * 300 + ending), "cannot be read (File name too long)"),
        "another kind of file": (mapped("config.json"), plain),
        "10^6 tensors": (
            b'{"weight_map": {' + b'"1": "a",' * 10**6 + b'"": ""}}',
            "bytes are too many for such a file",
        ),
        "20,000 shards": (
            json.dumps({"weight_map": {str(n): f"{n}{ending}" for n in range(20_000)}}).encode(),
            f"20000 of 20000 {missing}",
        ),
        "half a MB of lists": (b'{"weight_map": [' + b",".join([b"[]"] * 170_000) + b"]}", no_map),
    }
