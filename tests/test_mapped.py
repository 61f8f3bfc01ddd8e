"""Mapped weights: the same model, over the pages of its file, which nothing changes."""

from __future__ import annotations

import copy
import errno
import json
import mmap
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gemma2
from gemma2.checkpoints.safetensors_file import SafetensorsFile
from gemma2.cli import main
from gemma2.errors import BadModelFile, NonFiniteError
from gemma2.load import POCKET
from gemma2.memory import Free

IDS = torch.tensor([[2, 300, 17, 4000, 5, 5, 900]])
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the pocket model's folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        shutil.copy(POCKET / name, folder / name)
    return folder


def mapped(folder: Path, **options: Any) -> gemma2.Gemma:
    return gemma2.load(folder, device="cpu", mapped=True, **options)


def stored(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, in memory of their own: the library maps them, and these files are written anew."""
    return {name: value.clone() for name, value in load_file(file).items()}


def note_of(gemma: gemma2.Gemma) -> str:
    (note,) = [note for note in gemma.notes if "mapped" in note]
    return note


def move_tensors(file: Path, odd: bool) -> None:
    """Write the same tensors behind a header after which they begin at an odd place, or at an even one."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 != odd)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_a_mapped_model_is_the_model_and_reads_no_tensor(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gemma2.load(place, device="cpu")
    monkeypatch.setattr(SafetensorsFile, "rows", None)
    found = mapped(place)
    assert "68 tensors are mapped" in note_of(found) and "copied" not in note_of(found)
    state = found.model.state_dict()
    assert list(state) == list(plain.model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in plain.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(found.model(IDS), plain.model(IDS))
    assert found.generate("And God", 5) == plain.generate("And God", 5)
    assert not any("mapped" in note for note in plain.notes)


def test_what_is_changed_in_a_mapped_model_does_not_reach_the_file(place: Path) -> None:
    before = (place / "model.safetensors").read_bytes()
    found = mapped(place)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.fill_(1.0)
    assert all(bool((parameter == 1).all()) for parameter in found.model.parameters())
    assert (place / "model.safetensors").read_bytes() == before
    assert torch.equal(mapped(place).model.state_dict()[GATE], stored(place / "model.safetensors")[GATE])


def test_a_mapped_model_learns_and_is_copied_and_written_over_its_own_file(place: Path) -> None:
    found = mapped(place)
    stored = found.model.state_dict()[GATE].clone()
    optimizer = torch.optim.SGD(found.model.parameters(), lr=0.1)
    found.model(IDS).float().logsumexp(-1).sum().backward()
    optimizer.step()
    learnt = found.model.state_dict()[GATE].clone()
    assert not torch.equal(learnt, stored)
    twin = copy.deepcopy(found.model)
    assert twin.state_dict()[GATE].untyped_storage().nbytes() == stored.nbytes
    gemma2.save(found, place, force=True)
    assert torch.equal(found.model.state_dict()[GATE], learnt) and torch.equal(twin.state_dict()[GATE], learnt)
    assert torch.equal(mapped(place).model.state_dict()[GATE], learnt)


@pytest.mark.parametrize(("odd", "copied"), [(False, 0), (True, 68)])
def test_tensors_at_odd_places_are_copied_and_the_note_says_how_many(place: Path, odd: bool, copied: int) -> None:
    file = place / "model.safetensors"
    plain = stored(file)
    move_tensors(file, odd)
    found = mapped(place)
    assert f"{68 - copied} tensors are mapped" in note_of(found)
    assert (f"{copied} were copied" in note_of(found)) == (copied > 0)
    assert all(torch.equal(found.model.state_dict()[name], value) for name, value in plain.items())


def test_tensors_of_another_dtype_are_copied(place: Path) -> None:
    file = place / "model.safetensors"
    tensors = {name: value.float() if "norm" in name else value for name, value in stored(file).items()}
    save_file(tensors, file)
    found, norms = mapped(place), sum("norm" in name for name in tensors)
    assert f"{len(tensors) - norms} tensors are mapped" in note_of(found) and f"{norms} were copied" in note_of(found)
    assert found.model.state_dict()["model.norm.weight"].dtype == torch.bfloat16


def test_shards_are_mapped_each(place: Path) -> None:
    file = place / "model.safetensors"
    tensors = stored(file)
    file.unlink()
    index: dict[str, str] = {}
    for part in range(2):
        name = f"model-{part + 1:05}-of-00002.safetensors"
        index |= dict.fromkeys(sorted(tensors)[part::2], name)
        save_file({key: tensors[key] for key in sorted(tensors)[part::2]}, place / name)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    found = mapped(place)
    assert f"{len(tensors)} tensors are mapped" in note_of(found)
    assert all(torch.equal(found.model.state_dict()[name], value) for name, value in tensors.items())


def test_values_that_are_not_finite_are_met_when_they_are_used(place: Path) -> None:
    tensors = stored(place / "model.safetensors")
    tensors[GATE][3, 5] = torch.nan
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(BadModelFile, match="NaN or infinity"):
        gemma2.load(place, device="cpu")
    found = mapped(place)
    assert "not checked for NaN and infinity" in note_of(found)
    with pytest.raises(NonFiniteError):
        found.generate("And God", 1)


def test_mapped_weights_need_no_free_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.memory.free_memory", lambda device: Free(100, "a test"))
    with pytest.raises(MemoryError):
        gemma2.load(place, device="cpu")
    assert mapped(place).generate("And God", 1)


def test_what_cannot_be_mapped_is_refused_with_the_cure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["gemma2.load"], "build", None)
    with pytest.raises(BadModelFile, match=r"mapped weights need safetensors files.* this is gguf: leave mapped out"):
        mapped(POCKET / "pocket-q8_0.gguf")
    with pytest.raises(ValueError, match=r"as they are stored, in bfloat16, and cannot run in float32: leave mapped"):
        mapped(place, dtype="float32")
    with pytest.raises(ValueError, match="device_map says where to copy them"):
        gemma2.load(place, mapped=True, device_map="auto")
    monkeypatch.setattr(sys.modules["gemma2.load"], "parse_device", lambda device: torch.device("cuda"))
    with pytest.raises(ValueError, match=r'give device="cpu" \(--device cpu\) instead of cuda'):
        gemma2.load(place, mapped=True)
    monkeypatch.undo()
    torch.save(stored(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(BadModelFile, match=r"mapped weights need safetensors files.* this is bin"):
        mapped(place)
    torch.save({"embedder.weight": torch.zeros(1)}, place / "model.ckpt")
    with pytest.raises(BadModelFile):
        mapped(place / "model.ckpt")


def test_a_float16_folder_runs_in_float32_and_so_is_not_mapped_unless_it_is_forced(place: Path) -> None:
    file = place / "model.safetensors"
    save_file({name: value.half() for name, value in stored(file).items()}, file)
    with pytest.raises(ValueError, match="in float16, and cannot run in float32"):
        mapped(place)
    assert mapped(place, dtype="float16", force_float16=True).model.dtype == torch.float16


def test_a_system_that_maps_nothing_and_a_file_that_shrank_are_said(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> Any:
        def run(*args: object, **kwargs: object) -> None:
            raise OSError(number, "refused")

        return run

    for number, kind in ((errno.ENOMEM, MemoryError), (errno.ENODEV, BadModelFile)):
        monkeypatch.setattr(mmap, "mmap", refuse(number))
        with pytest.raises(kind, match=r"does not map its 0.0116 GB \(refused\): leave mapped out"):
            mapped(place)
    monkeypatch.undo()
    opened = SafetensorsFile(place / "model.safetensors")
    with (place / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(BadModelFile, match="shorter"):
        opened.view(GATE)


def test_a_head_that_is_not_the_embedding_is_still_refused(place: Path) -> None:
    file = place / "model.safetensors"
    tensors = stored(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert "68 tensors are mapped" in note_of(mapped(place)) and "copied" not in note_of(mapped(place))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(BadModelFile, match="differs from the embedding"):
        mapped(place)


def test_the_command_maps_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(place), "--device", "cpu", "--mapped", "--verbose", "-n", "2", "And"]) == 0
    assert "tensors are mapped" in capsys.readouterr().err
