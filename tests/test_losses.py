"""The loss in pieces: values and gradients of the plain one, no logits of a text, and what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gemma2
from gemma2 import head, losses
from gemma2.load import POCKET
from gemma2.losses import cross_entropy, next_tokens
from gemma2.model import SoftCap
from gemma2.ops import upcast
from gemma2.recompute import recomputed
from gemma2.twins import on, replaced
from tests.conftest import ids, tiny

TOKENS = ids(2, 40)  # past the window of 16
TARGETS = next_tokens(TOKENS)
TARGETS[0, :7] = losses.IGNORED
Loss = Callable[[gemma2.Gemma2], Tensor]


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 71 tokens that count see 84 of the 512 pieces at once, in 7 slices, the last one shorter; the modules get 11
    of the tokens at once, in 7 parts, the last one shorter."""
    monkeypatch.setattr(head, "AT_ONCE", 6000)
    monkeypatch.setattr(losses, "AT_ONCE_BY_MODULES", 6000)


def plain(model: gemma2.Gemma2, **options: Any) -> Tensor:
    return F.cross_entropy(upcast(model(TOKENS)).flatten(0, 1), TARGETS.flatten(), **options)


def ours(model: gemma2.Gemma2, **options: Any) -> Tensor:
    return cross_entropy(model, model.model(TOKENS), TARGETS, **options)


def gradients(model: gemma2.Gemma2, loss: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = loss(model)
    found.backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any gradient, by the largest value of its tensor."""
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).abs().max() / one[name].abs().max()).item() for name in one)


class Hooked(SoftCap):
    """A cap of another class with the same values: the loss must not take it for the plain one."""


def with_hook(model: gemma2.Gemma2) -> Any:
    return model.lm_head.register_forward_hook(lambda *_: None)


def with_twin(model: gemma2.Gemma2) -> Any:
    return replaced(model, on(SoftCap, lambda old: Hooked(old.cap)))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("size", "dtype", "bound"),
    [
        ("2b", torch.float32, 1e-6),
        ("27b", torch.float32, 1e-6),
        ("9b", torch.float64, 1e-12),
        pytest.param("9b", torch.float32, 1e-6, marks=LONG),
        pytest.param("2b", torch.float64, 1e-12, marks=LONG),
        pytest.param("27b", torch.float64, 1e-12, marks=LONG),
    ],
    ids=str,
)
def test_value_and_gradients_are_those_of_the_plain_loss(
    size: str, dtype: torch.dtype, bound: float, in_pieces: None
) -> None:
    model = tiny(size, num_hidden_layers=2).to(dtype)
    assert model(TOKENS).abs().max() > 29.9  # the cap saturates
    loss, expected = gradients(model, plain)
    for change in (None, with_hook, with_twin):
        changed = change(model) if change else None
        value, found = gradients(model, ours)
        if changed is not None:
            (changed.restore if isinstance(changed, replaced) else changed.remove)()
        assert value.dtype == dtype and abs((value - loss) / loss) < bound
        assert farthest(expected, found) < bound, change


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_each_reduction_is_pytorchs(reduction: str, in_pieces: None) -> None:
    model = tiny("9b", num_hidden_layers=1).double()
    scale = torch.rand(TARGETS.shape, dtype=torch.float64)  # so that each token's own gradient matters

    def reduced(value: Tensor) -> Tensor:
        return (value.view_as(scale) * scale).sum() if reduction == "none" else value

    loss, expected = gradients(model, lambda model: reduced(plain(model, reduction=reduction)))
    for hook in (False, True):
        removable = with_hook(model) if hook else None
        value, found = gradients(model, lambda model: reduced(ours(model, reduction=reduction)))
        if removable:
            removable.remove()
        assert value == pytest.approx(loss.item(), rel=1e-12) and farthest(expected, found) < 1e-12
    with torch.no_grad():
        each = ours(model, reduction="none")
    assert each.shape == TARGETS.shape and not each[0, :7].any() and not each[:, -1].any()


def test_a_bfloat16_model_gets_gradients_as_exact_as_those_of_the_plain_loss(in_pieces: None) -> None:
    model = tiny(num_hidden_layers=1).bfloat16()
    states = model.model(TOKENS).detach()
    truth = copy.deepcopy(model).double()

    def of_both(model: gemma2.Gemma2, loss: Callable[[gemma2.Gemma2, Tensor], Tensor]) -> list[Tensor]:
        given = states.to(model.dtype).requires_grad_()
        weight = model.model.embed_tokens.weight
        return [g.double() for g in torch.autograd.grad(loss(model, given), (given, weight))]

    def plainly(model: gemma2.Gemma2, given: Tensor) -> Tensor:
        logits = model.softcap(model.lm_head(given, model.model.embed_tokens))
        return F.cross_entropy(upcast(logits).flatten(0, 1), TARGETS.flatten())

    expected = of_both(truth, plainly)
    theirs = of_both(model, plainly)
    found = of_both(model, lambda model, given: cross_entropy(model, given, TARGETS))
    for exact, other, own in zip(expected, theirs, found, strict=True):
        error, usual = (x.sub(exact).norm() / exact.norm() for x in (own, other))
        assert error < 1.1 * usual and usual < 0.02


def test_under_autocast_the_products_are_rounded_as_those_of_the_modules(in_pieces: None) -> None:
    model = tiny(num_hidden_layers=1)

    def loss(model: gemma2.Gemma2) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ours(model)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(TOKENS)
        assert logits.dtype == torch.bfloat16
        rounded = F.cross_entropy(logits.float().flatten(0, 1), TARGETS.flatten())
    value, found = gradients(model, loss)
    removable = with_hook(model)
    by_modules, expected = gradients(model, loss)
    removable.remove()
    assert value.dtype == torch.float32
    assert value == pytest.approx(rounded.item(), rel=1e-6) == by_modules.item()
    assert abs(value - ours(model)) > 1e-4  # without autocast it is another
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in found) < 0.02


def test_the_backward_pass_may_stand_inside_of_autocast(in_pieces: None) -> None:
    model = tiny(num_hidden_layers=1)
    states = model.model(TOKENS).detach().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(model, states, TARGETS), states)
    loss = cross_entropy(model, states, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(loss, states)
    assert torch.equal(found, expected)  # the products are those of the forward pass, which was outside


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.values = max([self.values, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("hook", [False, True])
def test_no_logits_of_the_text_are_ever_made(hook: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "AT_ONCE", 2**15)
    monkeypatch.setattr(losses, "AT_ONCE_BY_MODULES", 2**15)
    model = tiny("9b", vocab_size=2048)
    tokens = ids(4, 250, vocab=2048)
    states = model.model(tokens).detach().requires_grad_()
    if hook:
        with_hook(model)
    with Largest() as seen:
        cross_entropy(model, states, next_tokens(tokens)).backward()
    assert seen.values == model.model.embed_tokens.weight.numel()  # its gradient; logits would be nine times that
    with Largest() as seen:
        F.cross_entropy(model.softcap(model.lm_head(states, model.model.embed_tokens)).flatten(0, 1), tokens.flatten())
    assert seen.values == tokens.numel() * 2048


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_is_a_fraction_of_that_of_the_plain_loss() -> None:
    script = Path(__file__).parents[1] / "scripts" / "loss_memory.py"
    sizes = {"tokens": 512, "vocab": 65536, "width": 64, "threads": 1}
    given = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    said = subprocess.run([sys.executable, script, *given], check=True, capture_output=True, encoding="utf-8").stdout
    (ratio,) = (line.split("|")[2] for line in said.splitlines() if "ratio" in line)
    assert float(ratio) < 0.25, said  # 0.1 at 2,048 tokens of 256,000 pieces, where the logits are 16 times as many


def test_a_model_from_a_quantized_file_has_the_loss_of_its_own_logits() -> None:
    gemma = gemma2.load(POCKET / "pocket-q8_0.gguf", weights="packed", fast=True, device="cpu", dtype="float32")
    tokens = ids(2, 20, vocab=4096)
    targets = next_tokens(tokens)
    states = gemma.model.model(tokens).detach().requires_grad_()

    def loss(states: Tensor) -> Tensor:
        logits = gemma.model.softcap(gemma.model.lm_head(states, gemma.model.model.embed_tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    expected, found = loss(states), cross_entropy(gemma.model, states, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (one,), (other,) = torch.autograd.grad(expected, states), torch.autograd.grad(found, states)
    assert (one - other).norm() / one.norm() < 1e-5


def test_a_frozen_embedding_gets_no_gradient_and_states_without_one_none_either() -> None:
    model = tiny(num_hidden_layers=1)
    _, expected = gradients(model, ours)
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    _, found = gradients(model, ours)
    assert [*found] == ["model.layers.0.mlp.up_proj.weight"]
    assert farthest({name: expected[name] for name in found}, found) < 1e-6
    with torch.no_grad():
        states = model.model(TOKENS)
    assert not cross_entropy(model, states, TARGETS).requires_grad
    model.model.embed_tokens.requires_grad_(True)
    (of_head,) = torch.autograd.grad(cross_entropy(model, states, TARGETS), model.model.embed_tokens.weight)
    assert of_head.any()


def test_a_second_derivative_is_refused_and_one_of_a_hooked_head_is_had() -> None:
    model = tiny(num_hidden_layers=1)
    states = model.model(TOKENS).detach().requires_grad_()
    (first,) = torch.autograd.grad(cross_entropy(model, states, TARGETS), states, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.square().sum().backward()
    with_hook(model)
    (first,) = torch.autograd.grad(cross_entropy(model, states, TARGETS), states, create_graph=True)
    first.square().sum().backward()
    assert states.grad.any()


def test_what_is_no_target_is_named() -> None:
    model = tiny(num_hidden_layers=1)
    states = model.model(TOKENS)
    wrong = TARGETS.clone()
    wrong[1, 3] = 512
    for targets, match in (
        (wrong, r"target 512 at \[1, 3\] is outside the vocabulary \[0, 512\)"),
        (TARGETS[:, 1:], r"targets \[2, 39\] are not one for each of the states \[2, 40, 288\]"),
        (TARGETS.float(), "targets must be int64 or int32"),
        (torch.full_like(TARGETS, -100), "every target is -100"),
    ):
        with pytest.raises(ValueError, match=match):
            cross_entropy(model, states, targets)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        cross_entropy(model, states, TARGETS, reduction="average")
    with pytest.raises(ValueError, match=r"must be \[\.\.\. 288\]"):
        cross_entropy(model, model(TOKENS), TARGETS)


def test_another_number_may_mark_what_is_ignored() -> None:
    model = tiny(num_hidden_layers=1).double()
    targets = TARGETS.masked_fill(TARGETS == -100, 0)
    with torch.no_grad():
        found = cross_entropy(model, model.model(TOKENS), targets, ignore_index=0)
        assert found == ours(model) == pytest.approx(plain(model).item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"target -100 at \[0, 0\] is outside .* and not 0, which is ignored"):
        cross_entropy(model, model.model(TOKENS), TARGETS, ignore_index=0)


def test_autocast_leaves_float64_as_it_is() -> None:
    model = tiny(num_hidden_layers=1).double()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert ours(model) == pytest.approx(plain(model).item(), rel=1e-12)


def test_a_sum_of_no_target_is_nothing_and_changes_nothing() -> None:
    model = tiny(num_hidden_layers=1)
    value, found = gradients(
        model, lambda model: cross_entropy(model, model.model(TOKENS), TARGETS * 0 - 100, reduction="sum")
    )
    assert value == 0 and not any(gradient.any() for gradient in found.values())


def test_targets_are_the_next_tokens_and_none_for_padding() -> None:
    tokens, positions = gemma2.left_padded([[2, 5, 6, 7], [2, 9]])
    assert next_tokens(tokens, positions).tolist() == [[5, 6, 7, -100], [-100, -100, 9, -100]]
    assert next_tokens(tokens, positions, ignore_index=0)[1].tolist() == [0, 0, 9, 0]


def test_layers_that_are_recomputed_have_the_same_gradients_and_keep_less() -> None:
    model = tiny("9b", num_hidden_layers=2)
    value, expected = gradients(model, ours)
    kept = {}
    for name in ("plain", "recomputed"):
        sizes: list[int] = []
        around = recomputed(model) if name == "recomputed" else None

        def keep(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.zero_grad()
            loss = ours(model)
        kept[name] = sum(sizes)
        loss.backward()
        assert loss == value
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert farthest(expected, own) == 0.0
        if around is not None:
            with pytest.raises(ValueError, match="recomputed already"):
                recomputed(model)
            with pytest.raises(ValueError, match="takes no cache"):
                model(TOKENS, cache=gemma2.HybridCache(model.config, 2, 50))
            with torch.no_grad():
                model(TOKENS, cache=gemma2.HybridCache(model.config, 2, 50))
            around.restore()
    assert kept["recomputed"] < 0.2 * kept["plain"], kept


def test_gradients_through_the_whole_model_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for size in ("2b", "9b", "27b"):
        model = tiny(size, num_hidden_layers=2)  # a local layer and a global one
        stated = gemma2.config_dict(model.config)
        config = transformers.Gemma2Config(
            **{name: value for name, value in stated.items() if name not in ("model_type", "architectures")},
            attn_implementation="eager",
        )
        theirs = transformers.Gemma2ForCausalLM(config)
        theirs.load_state_dict({**model.state_dict(), "lm_head.weight": model.model.embed_tokens.weight.detach()})
        labels = TOKENS.clone()
        labels[0, :8] = -100
        loss = theirs(TOKENS, labels=labels, use_cache=False).loss
        loss.backward()
        others: dict[str, Tensor] = {name: p.grad for name, p in theirs.named_parameters()}
        assert model(TOKENS).abs().max() > 29.9
        value, own = gradients(model, plain)
        assert value == loss and own.keys() == others.keys()
        assert all(torch.equal(own[name], others[name]) for name in own)  # to the bit
        value, found = gradients(model, ours)
        assert value.item() == pytest.approx(loss.item(), rel=1e-6) and farthest(others, found) < 1e-6
