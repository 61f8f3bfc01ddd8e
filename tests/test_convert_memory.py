"""A model in memory is written as a checkpoint that holds it to the bit; what is no Gemma 2 any more is refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gemma2
from gemma2 import BadModelFile
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.convert import convert
from gemma2.load import POCKET
from gemma2.numerics import with_numerics
from gemma2.tokenizer import Tokenizer
from tests.test_convert import TARGETS
from tests.test_tokenizer import space_prefixed

QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def trained(pocket: gemma2.Gemma) -> gemma2.Gemma:
    """The pocket model after three steps of training, all of whose weights have moved."""
    gemma = gemma2.Gemma(deepcopy(pocket.model), pocket.tokenizer, True, ["a note"])
    optimizer = torch.optim.AdamW(gemma.model.parameters(), lr=1e-4)
    tokens = torch.tensor([gemma.tokenizer.encode("In the beginning God created the heaven")])
    for _ in range(3):
        logits = gemma.model(tokens)[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return gemma


def unequal(model: nn.Module, other: nn.Module) -> list[str]:
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    return [
        name
        for name in mine
        if mine[name].dtype != theirs[name].dtype
        or not torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8))
    ]


@pytest.mark.parametrize("target", TARGETS.values())
def test_a_trained_model_is_written_and_loads_to_the_bit(target: str, trained: gemma2.Gemma, tmp_path: Path) -> None:
    made = gemma2.convert(trained, tmp_path / target, progress=False)
    assert made.tensors == {"F32": 56 if target.endswith("ckpt") else 68} and made.notes[0] == "a note"
    again = gemma2.load(made.path, progress=False)
    assert not unequal(trained.model, again.model)
    assert len(unequal(gemma2.load(POCKET, dtype="float32", progress=False).model, again.model)) == 68
    assert again.config == trained.config and again.chat_tuned is True
    assert again.tokenizer.to_proto() == trained.tokenizer.to_proto() or target.endswith("gguf")
    assert again.generate("And God", 12) == trained.generate("And God", 12)


@pytest.mark.long
def test_a_model_alone_is_saved_with_the_tokenizer_that_is_given(trained: gemma2.Gemma, tmp_path: Path) -> None:
    compiled: Any = torch.compile(trained.model)
    held = gemma2.Gemma(compiled, trained.tokenizer)
    given: dict[str, Any] = {"model": trained.model, "compiled": compiled, "held": held}
    for name, model in given.items():
        made = gemma2.save(model, tmp_path / name, tokenizer=POCKET / "tokenizer.model", progress=False)
        again = gemma2.load(made.path, progress=False)
        assert not unequal(trained.model, again.model)
        assert again.tokenizer.to_proto() == trained.tokenizer.to_proto()
    with pytest.raises(ValueError, match=r"a model alone has no tokenizer .* name one with tokenizer="):
        gemma2.save(trained.model, tmp_path / "alone")
    with pytest.raises(BadModelFile, match="the model in memory is of type Linear: give a Gemma"):
        gemma2.save(nn.Linear(2, 2), tmp_path / "other", tokenizer=trained.tokenizer)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled", "held", "model"]


def test_transformers_opens_what_was_written_and_computes_the_same_bits(trained: gemma2.Gemma, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = convert(trained, tmp_path / "out", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made.path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.tensor([trained.tokenizer.encode("And God said, Let there be light")])
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, trained.model(tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_type_is_that_of_the_parameters_unless_another_is_asked_for(dtype: str, tmp_path: Path) -> None:
    """float64 here only holds what bfloat16 did, so float32 is enough."""
    gemma = gemma2.load(POCKET, dtype=dtype, progress=False)
    main = {"bfloat16": "BF16", "float64": "F32"}[dtype]
    assert max(convert(gemma, tmp_path / "own", progress=False).tensors.items())[0] == main
    assert not unequal(gemma.model, gemma2.load(tmp_path / "own", dtype=dtype, progress=False).model)
    quantized = convert(gemma, tmp_path / "out.gguf", type="q8_0", progress=False)
    convert(POCKET, tmp_path / "file.gguf", type="q8_0", progress=False)
    assert quantized.tensors["Q8_0"] == 43
    files = [gemma2.load(tmp_path / name, progress=False).model for name in ("out.gguf", "file.gguf")]
    assert not unequal(*files)


def test_a_model_from_a_quantized_file_keeps_its_values(tmp_path: Path) -> None:
    convert(POCKET, tmp_path / "small.gguf", type="q4_0", progress=False)
    gemma = gemma2.load(tmp_path / "small.gguf", dtype="float32", progress=False)
    convert(gemma, tmp_path / "out", progress=False)
    assert not unequal(gemma.model, gemma2.load(tmp_path / "out", progress=False).model)


def test_what_is_said_of_chat_and_the_tokenizer_are_the_gemmas_or_those_given(
    pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    for tuned in (True, False, None):
        gemma = gemma2.Gemma(pocket.model, pocket.tokenizer, tuned)
        assert gemma2.load(convert(gemma, tmp_path / str(tuned), progress=False).path).chat_tuned is tuned
    spaced = Tokenizer(space_prefixed(pocket.tokenizer.to_proto()))
    convert(pocket, tmp_path / "spaced", tokenizer=spaced, progress=False)
    assert open_checkpoint(tmp_path / "spaced").tokenizer.space_prefix
    with pytest.raises(ValueError, match="revision= is for a hub name"):
        convert(pocket, tmp_path / "revised", revision="main")
    assert not (tmp_path / "revised").exists()


def test_the_file_that_a_model_came_from_may_be_replaced_by_it(tmp_path: Path) -> None:
    path = convert(POCKET, tmp_path / "own", progress=False).path
    gemma = gemma2.load(path, progress=False)
    with torch.no_grad():
        gemma.model.model.norm.weight.add_(1)
    with pytest.raises(FileExistsError, match="is there already"):
        convert(gemma, path)
    convert(gemma, path, force=True, progress=False)
    assert not unequal(gemma.model, gemma2.load(path, progress=False).model)


def test_a_numerics_profile_has_the_parameters_of_the_model_and_is_written_as_it(
    pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    twin = gemma2.Gemma(with_numerics(pocket.model, "gemma_pytorch"), pocket.tokenizer)
    assert not unequal(pocket.model, gemma2.load(convert(twin, tmp_path / "out", progress=False).path).model)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2)


class Int8(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight[:1].char())


class Biased(nn.Linear):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Callable[[gemma2.Gemma2], Any]:
    def change(model: gemma2.Gemma2) -> None:
        base = model.get_submodule(QUERY)
        assert isinstance(base, nn.Linear)
        model.set_submodule(QUERY, make(base))

    return change


@torch.no_grad()
def with_nan(model: gemma2.Gemma2) -> None:
    model.get_parameter(f"{QUERY}.weight")[3, 5] = torch.nan


@torch.no_grad()
def beyond_float32(model: gemma2.Gemma2) -> None:
    model.double().get_parameter(f"{QUERY}.weight").add_(1e-12)


def trained_norm(model: gemma2.Gemma2) -> None:
    weight: Tensor = model.double().model.norm.weight
    with torch.no_grad():
        weight.add_(1e-12)


WEIGHT = r"has no weight \[512, 256\], as a Gemma 2 has there; merge what was added"
REFUSED: dict[str, tuple[Callable[[gemma2.Gemma2], Any], str]] = {
    "LoRA": (replaced(Lora), rf"{QUERY} \(Lora\) {WEIGHT}"),
    "int8": (replaced(Int8), rf"{QUERY}.weight is \[1, 256\], and its config makes it \[512, 256\]"),
    "another parameter": (replaced(Biased), f"{QUERY}.bias: no Gemma 2 has that; merge"),
    "no module": (replaced(lambda base: nn.Identity()), rf"{QUERY} \(Identity\) {WEIGHT}"),
    "no values": (lambda model: model.to("meta"), "model.embed_tokens.weight has no values here"),
    "NaN": (with_nan, f"{QUERY}.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_no_gemma_2_any_more_is_refused_by_name_and_nothing_is_written(
    case: str, pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    change, said = REFUSED[case]
    model = deepcopy(pocket.model)
    change(model)
    with pytest.raises(gemma2.BadModelFile, match=f"the model in memory.*{said}"):
        convert(gemma2.Gemma(model, pocket.tokenizer), tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("change", [beyond_float32, trained_norm])
def test_values_that_float32_does_not_hold_are_written_as_float64_or_rounded_with_a_note(
    change: Callable[[gemma2.Gemma2], Any], pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    model = deepcopy(pocket.model)
    change(model)
    gemma = gemma2.Gemma(model, pocket.tokenizer)
    for name in ("own", "own.ckpt"):
        made = convert(gemma, tmp_path / name, progress=False)
        assert made.tensors.keys() == {"F64"} and made.notes == ()
        again = gemma2.load(made.path, progress=False)
        assert again.model.dtype == torch.float64 and not unequal(model, again.model)
        assert again.notes[-1].endswith('holds float64 and runs in it; dtype="float32" takes half the memory')
    transformers = pytest.importorskip("transformers", reason="the live comparison needs gemma2[transformers]")
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "own", dtype="auto").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    narrow = deepcopy(model).float()
    for name, type in (("f32", "f32"), ("f32.ckpt", "f32"), ("x.gguf", None)):
        for source in (gemma, tmp_path / "own"):
            made = convert(source, tmp_path / name, type=type, force=True, progress=False)
            assert made.tensors.keys() == {"F32"}
            said = [note for note in made.notes if note.endswith("f64 keeps every bit")]
            count = 1 if source is gemma else len(model.state_dict())
            assert [note.split(";")[0] for note in said] == [f"{count} tensors of float64 were rounded to f32"]
            assert not unequal(narrow, gemma2.load(made.path, dtype="float32", progress=False).model)


def test_a_source_that_is_neither_a_path_nor_a_gemma_is_refused(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source is of type Gemma2: give a path, a name or a Gemma"):
        convert(pocket.model, tmp_path / "out")  # type: ignore[arg-type]
    wrapped = gemma2.Gemma(nn.Sequential(pocket.model), pocket.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(gemma2.BadModelFile, match="is of type Sequential: give a Gemma whose model is a Gemma2"):
        convert(wrapped, tmp_path / "out")
    assert not list(tmp_path.iterdir())
