"""Twins that are there before any weight is read, and fill themselves from a file's stored blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemma2
from gemma2.checkpoints.weights import Weights
from gemma2.model import RMSNorm
from gemma2.twins import on
from tests.test_twins import LayerNormed, LoRA

SOURCE = "pocket:pocket-q8_0.gguf"
EACH = 32  # weights of a Q8_0 block: a float16 scale, then 32 int8


class PackedLinear(nn.Module):
    """Holds Q8_0 blocks and multiplies them out at every call."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.blocks: Tensor
        self.rows = plain.out_features
        self.register_buffer("blocks", torch.empty(0, dtype=torch.uint8), persistent=True)

    def fill(self, weights: Weights, path: str, device: torch.device) -> None:
        assert weights.stored(f"{path}.weight") == "Q8_0"
        self.blocks = weights.raw(f"{path}.weight", 0, self.rows).to(device)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks.view(self.rows, -1, 2 + EACH)
        scale = blocks[..., :2].clone().view(torch.float16).float()
        weight = blocks[..., 2:].clone().view(torch.int8).float() * scale
        return F.linear(x, weight.flatten(1).to(x.dtype))


class Stored:
    """Of `Weights`, what a twin needs to fill itself: one matrix of blocks."""

    where = "blocks"

    def __init__(self, raw: Tensor, kind: str) -> None:
        self.blocks, self.kind = raw, kind

    def stored(self, name: str) -> str:
        return self.kind

    def raw(self, name: str, start: int, stop: int) -> Tensor:
        return self.blocks[start:stop].clone()

    def in_file(self, name: str) -> str:
        return name

    def release(self) -> None: ...


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@torch.no_grad()
def test_packed_blocks_compute_what_the_dequantised_weights_do_in_less_memory() -> None:
    plain = gemma2.load(SOURCE, dtype="float32", device="cpu")
    packed = gemma2.load(SOURCE, dtype="float32", device="cpu", make=on(nn.Linear, PackedLinear))
    tokens = torch.tensor([plain.tokenizer.encode("And God said, Let there be light")])
    assert torch.equal(packed.model(tokens), plain.model(tokens))
    assert packed.generate("And God said", 12) == plain.generate("And God said", 12)
    assert bytes_of(packed.model) < 0.55 * bytes_of(plain.model)  # the embedding stays as it was
    assert not any(isinstance(module, nn.Linear) for module in packed.model.modules())
    assert packed.model.model.rotary_emb.inv_freq.dtype == torch.float32


@torch.no_grad()
def test_a_twin_that_keeps_the_parameters_is_filled_like_the_module_it_stands_for() -> None:
    plain = gemma2.load(dtype="float32", device="cpu")
    other = gemma2.load(dtype="float32", device="cpu", make=on(RMSNorm, LayerNormed))
    mine, theirs = plain.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    tokens = torch.tensor([[2, 500, 600]])
    assert not torch.equal(plain.model(tokens), other.model(tokens))


def test_what_cannot_be_filled_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("gemma2.checkpoints.folder.FileWeights.read", explode)
    cases: dict[str, Callable[[], object]] = {
        "a twin has other parameters": lambda: gemma2.load(device="cpu", make=on(nn.Linear, LoRA)),
        "nothing was replaced": lambda: gemma2.load(device="cpu", make=on(nn.Conv1d, LoRA)),
        "give one of them": lambda: gemma2.load(device="cpu", numerics="litgpt", make=on(nn.Linear, LoRA)),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


@torch.no_grad()
def test_raw_rows_of_a_plain_file_are_its_bytes() -> None:
    class Halves(nn.Module):
        """Takes the stored bfloat16 bytes of a safetensors file."""

        def __init__(self, plain: nn.Linear) -> None:
            super().__init__()
            self.rows = plain.out_features
            self.register_buffer("weight", torch.empty(0), persistent=True)

        def fill(self, weights: Weights, path: str, device: torch.device) -> None:
            assert weights.stored(f"{path}.weight") == "BF16"
            self.weight = weights.raw(f"{path}.weight", 0, self.rows).view(torch.bfloat16).to(device)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype))

    plain, halves = gemma2.load(device="cpu"), gemma2.load(device="cpu", make=on(nn.Linear, Halves))
    assert torch.equal(plain.model(torch.tensor([[2, 500, 600]])), halves.model(torch.tensor([[2, 500, 600]])))


def test_a_twin_that_leaves_something_without_values_is_refused() -> None:
    class Forgetful(PackedLinear):
        def __init__(self, plain: nn.Linear) -> None:
            super().__init__(plain)
            self.register_buffer("scales", torch.empty(3, device="meta"))

    with pytest.raises(ValueError, match=r"q_proj: fill\(\) of Forgetful left scales without values"):
        gemma2.load(SOURCE, dtype="float32", device="cpu", make=on(nn.Linear, Forgetful))


@torch.no_grad()
def test_parameters_of_whole_numbers_and_frozen_ones_stay_so() -> None:
    class Counted(PackedLinear):
        def __init__(self, plain: nn.Linear) -> None:
            super().__init__(plain)
            self.kept = nn.Parameter(torch.ones(2, dtype=torch.uint8, device="cpu"), requires_grad=False)
            self.frozen = nn.Parameter(torch.ones(2, device="cpu"), requires_grad=False)

    model = gemma2.load(SOURCE, dtype="float32", device="cpu", make=on(nn.Linear, Counted)).model
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"weight"}
