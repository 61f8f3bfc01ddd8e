"""A model spread over memory and the disk is the plain model to the bit, and takes no more memory than it was given."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2
from gemma2.cache import HybridCache
from gemma2.cli import main
from gemma2.distributed import offload
from gemma2.distributed.device_map import _limits, check_alone
from gemma2.distributed.offload import OffloadFolder
from gemma2.load import POCKET
from gemma2.research import capture
from tests.conftest import ids, tensors_of, tiny

accelerate = pytest.importorskip("accelerate")

PROMPT, TURNS = "In the beginning", [{"role": "user", "content": "Who made the world?"}]
WHOLE = 2 * 5_773_568  # bytes of the pocket model in bfloat16
HALF = {"cpu": WHOLE // 2}


def places(gemma: gemma2.Gemma) -> list[bool]:
    """Of each layer, whether it is away."""
    return [all(parameter.is_meta for parameter in layer.parameters()) for layer in gemma.model.model.layers]


def spread(folder: Path, source: Any = POCKET, **options: Any) -> gemma2.Gemma:
    options = {"device_map": "auto", "max_memory": HALF, **options}
    return gemma2.load(source, offload_folder=folder, progress=False, **options)


@pytest.fixture(scope="module")
def plain() -> gemma2.Gemma:
    return gemma2.load(POCKET, device="cpu", progress=False)


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> gemma2.Gemma:
    return spread(tmp_path_factory.mktemp("offload"))


def test_layers_that_do_not_fit_are_on_the_disk_and_a_note_says_so(away: gemma2.Gemma) -> None:
    there = places(away)
    assert any(there) and not all(there) and sorted(there) == there  # the first layers are in memory
    first = there.index(True)
    assert first == 1 and away.notes[-1].startswith(
        "device_map: the embedding on cpu, layer 0 on cpu, layers 1 to 5 on the disk, in "
    )
    assert away.model.device == torch.device("cpu") and away.model.dtype == torch.bfloat16
    assert not away.model.model.embed_tokens.weight.is_meta and not away.model.model.norm.weight.is_meta


def test_memory_holds_what_it_was_given_and_the_disk_the_rest(away: gemma2.Gemma) -> None:
    held = sum(parameter.nbytes for parameter in away.model.parameters() if not parameter.is_meta)
    folder = Path(away.notes[-1].rpartition(" in ")[2])
    on_disk = sum(file.stat().st_size for file in folder.glob("*.dat"))
    assert held <= WHOLE // 2 and held + on_disk == WHOLE
    assert len(json.loads((folder / "index.json").read_text(encoding="utf-8"))) == len(list(folder.glob("*.dat")))


@torch.no_grad()
def test_logits_and_every_site_are_equal_to_the_bit(away: gemma2.Gemma, plain: gemma2.Gemma) -> None:
    tokens = ids(2, 20, vocab=4096)
    with capture(plain) as expected:
        logits = plain.model(tokens)
    with capture(away) as seen:
        assert torch.equal(away.model(tokens), logits)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], value) for name, value in expected.items())


@pytest.mark.long
def test_texts_are_the_same_greedy_sampled_in_a_batch_and_in_a_talk(away: gemma2.Gemma, plain: gemma2.Gemma) -> None:
    def texts(gemma: gemma2.Gemma) -> list[object]:
        talk = gemma2.Talk(gemma, 5)
        return [
            gemma.generate(PROMPT, 12),
            gemma.generate([PROMPT, "And God said, Let there be"], 6, temperature=1.0, top_p=0.9, seed=5),
            gemma.chat(TURNS, 8),
            "".join(talk.say("Who?")) + "".join(talk.say("And why?")),
        ]

    assert texts(away) == texts(plain)


@torch.no_grad()
def test_a_cache_is_that_of_the_plain_model(away: gemma2.Gemma, plain: gemma2.Gemma) -> None:
    caches = [HybridCache(gemma.config, 1, 40) for gemma in (away, plain)]
    for part in ids(1, 30, vocab=4096).split(10, dim=1):
        mine, theirs = (gemma.model(part, None, cache) for gemma, cache in zip((away, plain), caches, strict=True))
        assert torch.equal(mine, theirs)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.keys.device.type == "cpu" and torch.equal(one.keys, other.keys)


def test_the_head_reads_the_embedding_where_it_is(away: gemma2.Gemma) -> None:
    """accelerate moves what a module is given to the module's device, and the head is given the embedding."""
    embedding = away.model.model.embed_tokens
    before = embedding.weight.data_ptr()
    away.model(ids(1, 3, vocab=4096))
    assert embedding.weight.data_ptr() == before and away.model.model.embed_tokens is embedding
    map_: Any = away.model.hf_device_map
    together = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "softcap")
    assert {map_[name] for name in together} == {"cpu"}


FORMS: dict[str, Callable[[Path], Path]] = {
    "gguf": lambda folder: gemma2.convert(POCKET, folder / "m.gguf", type="q4_0", progress=False).path,
    "ckpt": lambda folder: gemma2.convert(POCKET, folder / "m.ckpt", progress=False).path,
    "float32": lambda folder: gemma2.convert(POCKET, folder / "m", type="f32", progress=False).path,
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_every_format_can_be_spread(form: str, tmp_path: Path) -> None:
    source = FORMS[form](tmp_path)
    whole = gemma2.load(source, progress=False)
    half = {"cpu": sum(parameter.nbytes for parameter in whole.model.parameters()) // 2}
    one = spread(tmp_path / "offload", source, max_memory=half)
    assert any(places(one)) and one.model.dtype == whole.model.dtype
    tokens = ids(1, 20, vocab=4096)
    assert torch.equal(one.model(tokens), whole.model(tokens))


def test_the_folder_is_removed_with_the_model(tmp_path: Path) -> None:
    gemma = spread(tmp_path / "new" / "folder")
    (folder,) = (tmp_path / "new" / "folder").iterdir()
    assert any(folder.iterdir())
    gemma.generate(PROMPT, 2)
    del gemma
    gc.collect()
    assert not folder.exists() and not list((tmp_path / "new" / "folder").iterdir())


@pytest.mark.long
def test_two_models_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    first = spread(tmp_path)
    said = first.generate(PROMPT, 3)
    second = spread(tmp_path, FORMS["gguf"](tmp_path))
    assert second.generate(PROMPT, 3) and first.generate(PROMPT, 3) == said
    del second
    gc.collect()
    assert first.generate(PROMPT, 3) == said


def test_without_a_folder_it_is_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(offload, "IN_MEMORY", ())
    gemma = gemma2.load(POCKET, device_map="auto", max_memory=HALF, progress=False)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in gemma.notes[-1]
    del gemma
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_files_in_memory_are_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    monkeypatch.setattr(offload, "LASTING", Path("/dev/shm"))
    with pytest.raises(OSError, match=r"/dev/shm is kept in memory here: give offload_folder"):
        gemma2.load(POCKET, device_map="auto", max_memory=HALF, progress=False)
    monkeypatch.setattr(offload, "LASTING", tmp_path)
    if not offload._in_memory(tmp_path):
        assert str(tmp_path) in gemma2.load(POCKET, device_map="auto", max_memory=HALF, progress=False).notes[-1]


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "a tensor that is not finite": ("nan", {}, r"1 tensors hold NaN or infinity in float32: model.layers.3.mlp.up"),
    "a tensor that is missing": ("missing", {}, r"1 missing: model.layers.3.mlp.up_proj.weight"),
    "float16": ("good", {"dtype": "float16", "force_float16": False}, "float16 is too narrow"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_refused_without_a_map_is_refused_with_one_and_leaves_nothing(
    case: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    kind, options, words = BROKEN[case]
    tensors = tensors_of(tiny(vocab_size=4096))
    name = "model.layers.3.mlp.up_proj.weight"
    if kind == "nan":
        tensors[name][5, 7] = torch.nan
    if kind == "missing":
        del tensors[name]
    half = {"cpu": sum(tensor.nbytes for tensor in tensors.values()) * 6 // 10}
    with pytest.raises(ValueError, match=words):
        spread(tmp_path / "offload", folder(tensors=tensors), max_memory=half, **options)
    assert not list(tmp_path.glob("offload/*"))
    if kind == "nan":
        spread(tmp_path / "offload", folder("again", tensors=tensors), max_memory=half, allow_nonfinite=True)


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"e\+06 GB are needed there, and .* GB are free"):
        OffloadFolder(tmp_path, {"x": (torch.Size([10**15]), torch.float32)})
    assert not list(tmp_path.iterdir())


# Maps. Each device by name: this machine may have the processor alone.

LAYERS = {f"model.layers.{number}": "cpu" for number in range(6)}
MAPS: dict[str, tuple[Any, list[int]]] = {
    "everything by one key": ({"": "cpu"}, []),
    "a device's name": ("cpu", []),
    "a device": (torch.device("cpu"), []),
    "enough memory": ("sequential", []),
    "balanced": ("balanced", []),
    "balanced_low_0": ("balanced_low_0", []),
    "the layers by one key": (
        {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.layers": "disk"},
        list(range(6)),
    ),
    "one layer on the disk": ({"": "cpu", "model.layers.4": "disk"}, [4]),
    "as transformers writes one": (
        {"model.embed_tokens": "cpu", "lm_head": "cpu", **LAYERS, "model.layers.5": "disk", "model.norm": "disk"}
        | {"model.rotary_emb": "cpu"},
        [5],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", MAPS)
def test_a_map_may_be_a_name_a_device_or_module_paths(
    case: str, pocket: gemma2.Gemma, plain: gemma2.Gemma, tmp_path: Path
) -> None:
    map_, expected = MAPS[case]
    gemma = spread(tmp_path, device_map=map_, max_memory=None)
    assert [number for number, there in enumerate(places(gemma)) if there] == expected
    assert gemma.notes[-1].startswith("device_map: the embedding on cpu, ")
    tokens = ids(1, 9, vocab=4096)
    assert torch.equal(gemma.model(tokens), plain.model(tokens))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such name": ({"device_map": "automatic"}, "'automatic' is neither 'auto', .* nor a device that is here"),
    "a number": ({"device_map": 99}, "99 is neither 'auto'"),
    "a truth": ({"device_map": {"": True}}, "True is neither 'auto'"),
    "meta": ({"device_map": "meta"}, "'meta' holds no values"),
    "all on the disk": ({"device_map": "disk"}, "the embedding cannot be on the disk, because the head reads it too"),
    "an empty map": ({"device_map": {}}, "device_map has no place for model.embed_tokens"),
    "a layer without a place": (
        {"device_map": {"model.embed_tokens": "cpu", "model.layers.0": "cpu"}},
        "device_map has no place for model.layers.1",
    ),
    "half a layer": (
        {"device_map": {"": "cpu", "model.layers.3.mlp": "disk"}},
        "'model.layers.3.mlp' is none of .*: a layer stays whole",
    ),
    "a layer too many": ({"device_map": {"": "cpu", "model.layers.6": "cpu"}}, "'model.layers.6' is none of"),
    "the head elsewhere": (
        {"device_map": {"": "cpu", "lm_head": "disk"}},
        "lm_head is on disk and the embedding on cpu, but they are one tensor",
    ),
    "a device beside it": ({"device_map": "auto", "device": "cpu"}, "device_map and device cannot be combined"),
    "a profile": ({"device_map": "auto", "numerics": "litgpt"}, "device_map and numerics cannot be combined"),
    "twins": ({"device_map": "auto", "make": lambda path, module: None}, "device_map and make cannot be combined"),
    "memory without a map": ({"max_memory": {"cpu": 1}}, "max_memory and offload_folder are for a device_map"),
    "a folder without a map": ({"offload_folder": "x"}, "max_memory and offload_folder are for a device_map"),
    "memory for a map of one's own": (
        {"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}},
        "max_memory is for a device_map that is inferred",
    ),
    "memory of no device": ({"device_map": "auto", "max_memory": {"tpu": 1}}, "tpu is not recognized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_maps_that_cannot_be_are_refused_in_one_line(case: str) -> None:
    options, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as caught:
        gemma2.load(POCKET, progress=False, **options)
    assert "\n" not in str(caught.value)


def test_what_is_not_given_is_not_in_the_way_of_a_map() -> None:
    check_alone(device=None, numerics=None)


def test_an_embedding_that_fits_nowhere_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match=r"the embedding, .* need 0.00\d+ GB on one device, and the most is 1e-06 GB"):
        spread(tmp_path, max_memory={"cpu": 1000})
    assert not list(tmp_path.iterdir())


def test_max_memory_beyond_what_is_free_is_cut_to_that(tmp_path: Path) -> None:
    assert places(spread(tmp_path, max_memory={"cpu": "100000GiB"})) == [False] * 6
    assert _limits(accelerate.utils, {"cpu": "100000GiB"})["cpu"] < 10**14


def test_a_spread_model_is_not_saved_and_the_line_says_what_to_do(away: gemma2.Gemma, tmp_path: Path) -> None:
    with pytest.raises(
        gemma2.BadModelFile, match=r"no values here.*accelerate has moved it away: load the model whole"
    ):
        gemma2.convert(away, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_a_map(
    tmp_path: Path, plain: gemma2.Gemma, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    argv = ["generate", PROMPT, "-n", "5", "--device-map", "auto", "--offload-folder", str(tmp_path), "--verbose"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out == plain.generate(PROMPT, 5) + "\n"
    assert "note     device_map: the embedding on " in err and not caplog.records
    assert main(["generate", PROMPT, "--device-map", "nowhere"]) == 2
    assert "device_map: 'nowhere' is neither" in capsys.readouterr().err


def test_accelerates_warning_of_the_meta_device_is_not_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spread(tmp_path)
    assert not caplog.records


def test_without_accelerate_the_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"device_map needs accelerate.*pip install accelerate"):
        gemma2.load(device_map="auto", progress=False)


UNDER_A_LIMIT = """
import resource, sys
import psutil, torch, accelerate.big_modeling, accelerate.utils
import gemma2
folder, room = sys.argv[1], int(sys.argv[2])
gemma2.load(device_map="auto", max_memory={"cpu": 10**7}, progress=False).generate("In", 1)  # what takes memory once
most = psutil.Process().memory_info().vms + room
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    gemma2.load(folder, device="cpu", progress=False)
except MemoryError as error:
    print(error)
share = {"cpu": room // 2}  # the rest is for what is computed, and for PyTorch itself
gemma = gemma2.load(folder, device_map="auto", max_memory=share, offload_folder=folder + "/offload", progress=False)
print(sum(all(p.is_meta for p in layer.parameters()) for layer in gemma.model.model.layers))
with torch.no_grad():
    torch.save(gemma.model(torch.arange(3, 23)[None]), folder + "/logits.pt")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux counts them")
@torch.no_grad()
@pytest.mark.long
def test_under_a_limit_a_model_that_does_not_fit_runs_from_the_disk(folder: Callable[..., Path]) -> None:
    # Its matrices are larger than a chunk.
    shape = {"hidden_size": 320, "intermediate_size": 4096, "num_hidden_layers": 16}
    place = folder("large", **shape)
    whole = gemma2.load(place, device="cpu", progress=False)
    needed = sum(parameter.nbytes for parameter in whole.model.parameters())
    # The C library gives freed memory back at once, as it does by itself for the tensors of real models, over 32 MB.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **malloc}
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(place), str(needed // 2)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    refused, away = done.stdout.splitlines()
    assert f"the weights need {needed / 1e9:.3g} GB in float32" in refused and "RLIMIT_AS" in refused
    assert 11 <= int(away) < 16
    assert torch.equal(torch.load(place / "logits.pt"), whole.model(torch.arange(3, 23)[None]))
    assert not list((place / "offload").iterdir())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_on_two_gpus_each_layers_cache_is_on_its_layers_device(tmp_path: Path, plain: gemma2.Gemma) -> None:
    gemma = spread(tmp_path, max_memory={0: WHOLE // 2, 1: WHOLE // 2, "cpu": WHOLE})
    devices = [next(layer.parameters()).device for layer in gemma.model.model.layers]
    assert len(set(devices)) > 1 and gemma.model.device == torch.device("cuda", 0)
    cache = HybridCache(gemma.config, 1, 40)
    logits = gemma.model(ids(1, 20, vocab=4096).to(gemma.model.device), None, cache)
    assert logits.device == gemma.model.device
    assert [layer.keys.device for layer in cache.layers] == devices
    alone = gemma2.load(POCKET, device="cuda:0", progress=False)
    assert torch.equal(logits, alone.model(ids(1, 20, vocab=4096).to("cuda:0")))
    assert gemma.generate(PROMPT, 12) == alone.generate(PROMPT, 12)
    with capture(gemma, "blocks.*.hook_resid_post") as seen:
        gemma.generate(PROMPT, 2)
    assert [value.device for value in seen.values()] == devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_layers_in_memory_run_on_the_gpu(tmp_path: Path) -> None:
    gemma = spread(tmp_path, max_memory={0: WHOLE // 2, "cpu": WHOLE // 4})
    alone = gemma2.load(POCKET, device="cuda:0", progress=False)
    cache = HybridCache(gemma.config, 1, 40)
    tokens = ids(1, 20, vocab=4096).to("cuda:0")
    assert torch.equal(gemma.model(tokens, None, cache), alone.model(tokens))
    assert {layer.keys.device for layer in cache.layers} == {torch.device("cuda", 0)}
    assert gemma.generate(PROMPT, 12) == alone.generate(PROMPT, 12)


def test_a_spread_model_is_not_pickled_and_the_line_says_what_to_do(away: gemma2.Gemma) -> None:
    for what in (away, away.model):
        with pytest.raises(TypeError, match=r"spread by device_map cannot be pickled: .* load it in the other process"):
            pickle.dumps(what)
    again = copy.deepcopy(away)  # as before
    assert again.generate(PROMPT, 3) == away.generate(PROMPT, 3)
