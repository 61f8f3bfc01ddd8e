"""Google's .ckpt: pickles that are not read, and good ones, also int8, that give the tensors they were made from."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gemma2
from gemma2.checkpoints.safetensors import SINGLE
from tests.conftest import tensors_of, tiny
from tests.hostile.conftest import SMALL, shell

State = dict[Any, Any]
Refused = Callable[[Path, str], None]
QKV, UP, NORM = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def good() -> dict[str, Tensor]:
    return tensors_of(tiny(vocab_size=4096, **SMALL))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return shell(tmp_path / "model")


def google(tensors: dict[str, Tensor]) -> State:
    """The same tensors under Google's names, q, k and v fused, with the table gemma_pytorch keeps beside them."""
    state: State = {"freqs_cis": torch.polar(torch.ones(8, 2), torch.ones(8, 2))}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            state[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            state["embedder.weight" if "embed_tokens" in name else name] = tensor
    return state


def quantized(state: State) -> State:
    """Every matrix as int8 rows with one scale each, as Google's quantized checkpoints have them."""
    small: State = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and name != "freqs_cis":
            scale = tensor.abs().amax(dim=1) / 127
            small[name], small[f"{name}_scaler"] = (tensor / scale[:, None]).round().clamp(-127, 127).char(), scale
        else:
            small[name] = tensor
    return small


def test_a_ckpt_gives_the_tensors_of_the_safetensors_it_came_from(place: Path, good: dict[str, Tensor]) -> None:
    torch.save({"model_state_dict": google(good)}, place / "model.ckpt")
    torch.save(google(good), place / "bare.ckpt")
    save_file(good, place / SINGLE)
    expected = gemma2.load(place).model.state_dict()
    for name in ("model.ckpt", "bare.ckpt"):
        loaded = gemma2.load(place / name).model.state_dict()
        assert list(loaded) == list(expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_ckpt_is_unpickled_in_the_one_safe_way(
    place: Path, good: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model_state_dict": google(good)}, place / "model.ckpt")
    real, calls = torch.load, []

    def recorded(path: Path, **options: Any) -> Any:
        calls.append(options)
        return real(path, **options)

    monkeypatch.setattr(torch, "load", recorded)
    gemma2.load(place / "model.ckpt")
    assert calls and all(call["weights_only"] is True and call["mmap"] is True for call in calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_int8_ckpt_gives_rows_times_scales(dtype: torch.dtype, place: Path, good: dict[str, Tensor]) -> None:
    state = quantized({name: t.to(dtype) if name != "freqs_cis" else t for name, t in google(good).items()})
    assert sum(tensor.dtype == torch.int8 for tensor in state.values()) == 11
    torch.save({"model_state_dict": state}, place / "model.ckpt")
    loaded = gemma2.load(place / "model.ckpt").model.state_dict()
    q, k, v = (state[QKV] * state[f"{QKV}_scaler"][:, None]).split([16, 8, 8])
    assert torch.equal(loaded[QKV.replace("qkv", "q")], q)
    assert torch.equal(loaded[QKV.replace("qkv", "k")], k)
    assert torch.equal(loaded[QKV.replace("qkv", "v")], v)
    assert torch.equal(loaded[UP], state[UP] * state[f"{UP}_scaler"][:, None])
    for name, tensor in good.items():
        assert loaded[name].dtype == dtype
        assert (loaded[name].float() - tensor).abs().max() <= 0.02 * tensor.abs().max(), name


class Bomb:
    """Runs code when it is unpickled by anything that allows it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


CODE = "holds more than tensors, so it is not read: a pickle can run code"


@pytest.mark.parametrize("form", ["in the state", "as the state", "as a key", "as an attribute", "alone"])
def test_code_in_a_ckpt_does_not_run(
    form: str, place: Path, tmp_path: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    marker = tmp_path / "ran"
    bomb: Any = Bomb(marker)
    state = google(good)
    hooked = torch.ones(8)
    hooked.note = bomb  # type: ignore[attr-defined]  # torch pickles a tensor's own attributes
    content = {
        "in the state": {"model_state_dict": {**state, "x": bomb}},
        "as the state": {"model_state_dict": bomb},
        "as a key": {"model_state_dict": {**state, bomb: torch.ones(1)}},
        "as an attribute": {"model_state_dict": {**state, NORM: hooked}},
        "alone": bomb,
    }[form]
    torch.save(content, place / "model.ckpt")
    torch.load(place / "model.ckpt", weights_only=False)
    assert marker.exists(), "the bomb must work, or this test shows nothing"
    marker.unlink()
    refused(place / "model.ckpt", CODE)
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["pickle", "legacy torch.save"])
def test_code_in_a_file_without_a_zip_does_not_run(legacy: bool, place: Path, tmp_path: Path, refused: Refused) -> None:
    marker = tmp_path / "ran"
    file = io.BytesIO()
    if legacy:
        torch.save({"model_state_dict": Bomb(marker)}, file, _use_new_zipfile_serialization=False)
    else:
        pickle.dump(Bomb(marker), file)
    (place / "model.ckpt").write_bytes(file.getvalue())
    refused(place / "model.ckpt", CODE)
    assert not marker.exists()


# Files. Each case makes the bytes of a file from those of a good one.


def rezipped(
    change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED
) -> Callable[[bytes], bytes]:
    """The same archive with each entry's bytes changed; None leaves it out."""

    def make(whole: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(out, "w", method) as target:
            for entry in source.namelist():
                if (content := change(entry, source.read(entry))) is not None:
                    target.writestr(entry, content)
        return out.getvalue()

    return make


def pickled(content: bytes) -> Callable[[bytes], bytes]:
    return rezipped(lambda entry, old: content if entry.endswith("data.pkl") else old)


def legacy(state: State) -> bytes:
    file = io.BytesIO()
    torch.save({"model_state_dict": state}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


NOT = "not a PyTorch checkpoint ("
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "an empty file"),
    "HTML": (lambda raw: b"<!DOCTYPE html><html>", "an HTML page, perhaps an error page that was saved"),
    "LFS pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the weights"),
    "GGUF": (lambda raw: b"GGUF" + bytes(60), "byte 4: GGUF version 0"),
    "one byte": (lambda raw: b"P", NOT),
    "zeros": (lambda raw: bytes(4096), NOT),
    "noise": (lambda raw: bytes(range(256)) * 16, NOT),
    "a byte short": (lambda raw: raw[:-1], NOT),
    "cut in half": (lambda raw: raw[: len(raw) // 2], NOT),
    "cut in the first header": (lambda raw: raw[:20], NOT),
    "end alone": (lambda raw: raw[-200:], NOT),
    "no zip, a pickle": (lambda raw: pickle.dumps({"model_state_dict": {}}, protocol=2), NOT),
    "a legacy torch.save of too little": (lambda raw: legacy({NORM: torch.ones(8)}), "tensors do not fit the config"),
    "a legacy torch.save, cut": (lambda raw: legacy({NORM: torch.ones(8)})[:-9], NOT),
    "a zip of something else": (rezipped(lambda entry, old: None), NOT),
    "no data.pkl": (rezipped(lambda entry, old: None if entry.endswith("data.pkl") else old), NOT),
    "no tensors' bytes": (rezipped(lambda entry, old: None if "/data/" in entry else old), NOT),
    "pickle empty": (pickled(b""), NOT),
    "pickle of one opcode": (pickled(b"."), NOT),
    "pickle with an empty stack": (pickled(b"\x80\x02R."), NOT),
    "pickle cut": (rezipped(lambda entry, old: old[:50] if entry.endswith("data.pkl") else old), CODE),
    "pickle of an unknown opcode": (pickled(b"\x80\x02\xff."), CODE),
    "pickle that calls": (pickled(b"cposix\nsystem\n(Vtrue\ntR."), CODE),
    "pickle that imports": (pickled(b"\x80\x02ctorch.hub\nload\n."), CODE),
    "null": (pickled(b"\x80\x02N."), "no model_state_dict of tensors in it"),
    "list": (pickled(b"\x80\x02]."), "no model_state_dict of tensors in it"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_or_foreign_ckpt_is_refused(
    case: str, place: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    file = io.BytesIO()
    torch.save({"model_state_dict": google(good)}, file)
    make, words = FILES[case]
    (place / "model.ckpt").write_bytes(make(file.getvalue()))
    refused(place / "model.ckpt", f"model.ckpt: {words}")


def test_a_ckpt_with_one_byte_of_its_pickle_changed_is_refused_or_the_same(
    place: Path, good: dict[str, Tensor]
) -> None:
    """Whatever the unpickler stumbles over must come out as BadModelFile."""
    file = io.BytesIO()
    torch.save({"model_state_dict": google(good)}, file)
    with zipfile.ZipFile(io.BytesIO(file.getvalue())) as archive:
        length = len(archive.read(next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))))
    refusals = 0
    for step in range(120):
        at, value = step * 7919 % length, step * 104729 % 256

        def change(entry: str, old: bytes, at: int = at, value: int = value) -> bytes:
            return old[:at] + bytes([value]) + old[at + 1 :] if entry.endswith("data.pkl") else old

        (place / "model.ckpt").write_bytes(rezipped(change)(file.getvalue()))
        try:
            gemma2.load(place / "model.ckpt", dtype="float32", progress=False)
        except gemma2.BadModelFile:
            refusals += 1
    assert refusals > 60


# States. Each case changes a good state, or a good int8 one.


def other(name: str, change: Callable[[Tensor], Any]) -> Callable[[State], State]:
    return lambda state: {**state, name: change(state[name])}


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


PLAIN = "without a name or without plain values: "
STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "empty": (lambda s: {}, "24 missing: model.embed_tokens.weight, "),
    "a number among the tensors": (lambda s: {**s, "step": 7}, "no model_state_dict of tensors in it"),
    "a list of tensors": (lambda s: {**s, NORM: [s[NORM]]}, "no model_state_dict of tensors in it"),
    "a number for a name": (lambda s: {**s, 7: torch.ones(1)}, f"1 tensors {PLAIN}7"),
    "sparse": (other(NORM, Tensor.to_sparse), f"{PLAIN}'{NORM}'"),
    "without values": (other(NORM, lambda t: t.to("meta")), f"{PLAIN}'{NORM}'"),
    "missing norm": (drop(NORM), f"1 missing: {NORM}"),
    "missing qkv": (drop(QKV), "3 missing: model.layers.0.self_attn.q_proj.weight, "),
    "missing embedder": (drop("embedder.weight"), "1 missing: model.embed_tokens.weight"),
    "extra": (lambda s: {**s, "x.y": torch.ones(2)}, "1 unknown: x.y"),
    "embedding twice": (
        lambda s: {**s, "model.embed_tokens.weight": s["embedder.weight"]},
        "embedder.weight and model.embed_tokens.weight are the same tensor",
    ),
    "q twice": (
        lambda s: {**s, QKV.replace("qkv", "q"): s[QKV][:16]},
        f"{QKV} and {QKV.replace('qkv', 'q')} are the same tensor",
    ),
    "qkv a row short": (other(QKV, lambda t: t[:-1]), f"{QKV} is [31, 8], the config needs 16 + 2 x 8 rows"),
    "qkv a scalar": (other(QKV, lambda t: t[0, 0]), f"{QKV} is [], the config needs 16 + 2 x 8 rows"),
    "qkv a vector": (other(QKV, lambda t: t[:, 0]), f"{QKV} is [32], the config needs 16 + 2 x 8 rows"),
    "qkv too wide": (other(QKV, lambda t: t.repeat(1, 2)), "q_proj.weight [16, 16] instead of [16, 8]"),
    "up transposed": (other(UP, lambda t: t.T), f"{UP} [8, 12] instead of [12, 8]"),
    "NaN": (other(NORM, lambda t: t * float("nan")), f"1 tensors hold NaN or infinity in float32: {NORM} (8)"),
    "complex": (other(NORM, lambda t: t.to(torch.complex64)), f"{NORM} (complex64)"),
}
INT8_STATES: dict[str, tuple[Callable[[State], State], str]] = {
    "scales missing": (drop(f"{UP}_scaler"), f"1 not floating-point: {UP} (int8)"),
    "scales of another count": (
        other(f"{UP}_scaler", lambda t: t[:-1]),
        f"{UP} (torch.int8, [12, 8]) and its scales [11]",
    ),
    "scales a column": (other(f"{UP}_scaler", lambda t: t[:, None]), "and its scales [12, 1] are not int8 rows"),
    "scale a scalar": (other(f"{UP}_scaler", lambda t: t[0]), "and its scales [] are not int8 rows"),
    "scales of integers": (other(f"{UP}_scaler", Tensor.int), "and its scales [12] are not int8 rows"),
    "scales NaN": (other(f"{UP}_scaler", lambda t: t * float("nan")), f"NaN or infinity in float32: {UP} (96)"),
    "scales for floats": (other(UP, Tensor.float), f"{UP} (torch.float32, [12, 8]) and its scales [12]"),
    "scales for int16": (other(UP, Tensor.short), f"{UP} (torch.int16, [12, 8]) and its scales [12]"),
    "scales without weights": (drop(UP), f"scales without weights: {UP}_scaler"),
    "scales stray": (lambda s: {**s, "x_scaler": torch.ones(2)}, "scales without weights: x_scaler"),
    "scales for a scalar": (
        lambda s: {**s, NORM: torch.tensor(1, dtype=torch.int8), f"{NORM}_scaler": torch.ones(())},
        f"1 misshapen: {NORM} [] instead of [8]",
    ),
}


@pytest.mark.parametrize("case", [*STATES, *INT8_STATES])
def test_a_state_that_does_not_fit_is_refused_by_name(
    case: str, place: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    change, words = {**STATES, **INT8_STATES}[case]
    state = google(good) if case in STATES else quantized(google(good))
    torch.save({"model_state_dict": change(state)}, place / "model.ckpt")
    refused(place / "model.ckpt", words)


def test_without_a_config_only_the_published_shapes_are_taken(
    place: Path, good: dict[str, Tensor], refused: Refused
) -> None:
    torch.save({"model_state_dict": google(good)}, place / "model.ckpt")
    (place / "config.json").unlink()
    refused(place / "model.ckpt", "not the shape of a published Gemma 2, so put its config.json beside it")
