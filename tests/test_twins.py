"""Modules are replaced and put back, to the bit; twins keep names or say what they hide; parameters are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.model import RMSNorm, SoftcapAttention, Tap
from gemma2.numerics import with_numerics
from gemma2.ops import visible
from gemma2.research import capture
from gemma2.research.heads import by_head
from gemma2.twins import Make, on, replaced, sharing
from tests.conftest import ids, tiny


class Int8Linear(nn.Module):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        weight = plain.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class LoRA(nn.Module):
    def __init__(self, plain: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = plain
        self.a = nn.Parameter(torch.randn(rank, plain.in_features, generator=generator).to(plain.weight) * 0.01)
        self.b = nn.Parameter(torch.ones(plain.out_features, rank).to(plain.weight) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class LayerNormed(RMSNorm):
    """Another norm: the mean is taken away first."""

    def __init__(self, plain: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class FusedAttention(nn.Module):
    """Scores and patterns are never formed by name."""

    hides: tuple[str, ...] = ("softcap", "hook_key_positions", "hook_scores_raw", "hook_attn_scores", "hook_pattern")

    def __init__(self, plain: SoftcapAttention) -> None:
        super().__init__()
        self.scale, self.cap, self.window = plain.scale, plain.softcap.cap, plain.window
        self.hook_z = plain.hook_z

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
        b, t, h, c = q.shape
        q = q.view(b, t, k.shape[2], -1, c)
        scores = torch.tanh(torch.einsum("btgrc,bsgc->bgrts", q, k) * self.scale / self.cap) * self.cap
        seen = visible(positions, key_positions, self.window)[:, None]
        pattern = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1)
        return self.hook_z(torch.einsum("bgrts,bsgc->btgrc", pattern, v).reshape(b, t, h, c))


MAKES: dict[str, tuple[Make, bool]] = {  # and whether the result is the plain one but for rounding
    "int8": (on(nn.Linear, Int8Linear), False),
    "LoRA": (on(nn.Linear, LoRA), False),
    "another norm": (on(RMSNorm, LayerNormed), False),
    "another attention": (on(SoftcapAttention, FusedAttention), True),
    "output by head": (by_head(tiny().config), True),
}


@pytest.mark.parametrize("name", MAKES)
@torch.no_grad()
def test_a_part_is_put_in_and_taken_out_and_the_model_is_the_same_to_the_bit(name: str) -> None:
    make, same = MAKES[name]
    model, tokens = tiny().double(), ids(2, 40)
    plain, modules, state = model(tokens), dict(model.named_modules()), dict(model.state_dict())
    with replaced(model, make) as twin:
        assert twin is model
        distance = (model(tokens) - plain).abs().max().item()
        assert (distance < 1e-10) if same else distance > 1e-3, distance
    assert torch.equal(model(tokens), plain)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert after.keys() == state.keys() and all(
        after[key] is state[key] or torch.equal(after[key], state[key]) for key in state
    )


@torch.no_grad()
def test_twins_can_be_nested_and_an_error_restores_too() -> None:
    model, tokens = tiny().double(), ids(1, 20)
    plain = model(tokens)
    outer = replaced(model, on(nn.Linear, LoRA))
    with_lora = model(tokens)
    assert set(outer.twins) == {path for path, module in model.named_modules() if isinstance(module, LoRA)}
    with pytest.raises(KeyError), replaced(model, on(RMSNorm, LayerNormed)):
        raise KeyError
    assert torch.equal(model(tokens), with_lora)
    outer.restore()
    assert torch.equal(model(tokens), plain) and not outer.twins


def test_what_is_inside_a_replaced_module_is_not_asked_for() -> None:
    asked: list[str] = []

    def make(path: str, module: nn.Module) -> nn.Module | None:
        asked.append(path)
        return FusedAttention(module) if isinstance(module, SoftcapAttention) else None

    with replaced(tiny(num_hidden_layers=1), make):
        pass
    assert "model.layers.0.self_attn.attend" in asked and "" not in asked
    assert not any(path.startswith("model.layers.0.self_attn.attend.") for path in asked)


def test_a_twin_without_a_tap_is_refused_unless_it_says_so_and_the_model_stays() -> None:
    class Silent(FusedAttention):
        hides = FusedAttention.hides[:-1]

    model = tiny(num_hidden_layers=2)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.attend: the twin Silent has no hook_pattern; keep it"):
        replaced(model, on(SoftcapAttention, Silent))
    with pytest.raises(ValueError, match="nothing was replaced"):
        replaced(model, on(nn.Conv1d, LoRA))
    assert dict(model.named_modules()) == before


def test_a_site_that_a_twin_hides_is_refused_by_name_and_the_others_are_seen() -> None:
    model = tiny(num_hidden_layers=2)
    with replaced(model, on(SoftcapAttention, FusedAttention)):
        with capture(model, ["blocks.*.attn.hook_z", "logits"]) as seen, torch.no_grad():
            model(ids(1, 20))
        assert len(seen) == 3
        message = (
            r"blocks\.0\.attn\.hook_pattern is hidden by the twin FusedAttention at model\.layers\.0\.self_attn\.attend"
        )
        with pytest.raises(ValueError, match=message), capture(model, "blocks.*.attn.hook_pattern"):
            pass


def test_sharing_gives_a_new_model_of_the_same_parameters_without_the_hooks() -> None:
    model = tiny()
    model.softcap.register_forward_hook(lambda m, i, o: o * 0)
    twin = sharing(model)
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert twin is not model and mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    with torch.no_grad():
        assert not model(ids(1, 5)).any() and twin(ids(1, 5)).any()
        wider = sharing(model, replace(model.config, sliding_window=40))
        assert wider.config.sliding_window == 40 and not torch.equal(wider(ids(1, 60)), twin(ids(1, 60)))


def test_sharing_keeps_float32_frequencies_and_the_mode() -> None:
    twin = sharing(tiny().bfloat16().eval())
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32 and not twin.training


def test_a_model_with_other_parameters_cannot_be_shared() -> None:
    model = tiny()
    with replaced(model, on(nn.Linear, LoRA)), pytest.raises(ValueError, match="not a Gemma 2's own parameters"):
        sharing(model)


@torch.no_grad()
def test_a_twin_takes_the_mode_of_the_module_it_stands_for() -> None:
    class Dropped(nn.Dropout):
        def __init__(self, tap: Tap) -> None:
            super().__init__(0.5)

    model, tokens = tiny().eval(), ids(1, 20)
    with replaced(model, on(Tap, Dropped)):
        assert torch.equal(model(tokens), model(tokens))


def test_frozen_parameters_stay_frozen_in_both_models() -> None:
    model = tiny()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    for twin in (sharing(model), with_numerics(model, "gemma_pytorch")):
        for each in (model, twin):
            assert [name for name, p in each.named_parameters() if p.requires_grad] == ["model.norm.weight"]


def test_replacements_are_taken_out_in_order_or_not_at_all() -> None:
    model = tiny(num_hidden_layers=1)
    first = replaced(model, on(nn.Linear, LoRA))
    second = replaced(model, on(LoRA, lambda module: nn.Sequential(module)))
    with pytest.raises(RuntimeError, match=r"q_proj was replaced once more since: restore\(\) that first"):
        first.restore()
    second.restore()
    first.restore()
    assert not any(isinstance(module, LoRA) for module in model.modules())
