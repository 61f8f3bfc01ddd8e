"""Mistakes that were made in real ports of Gemma 2, injected one at a time; and models in which nothing but rounding
differs. `parity` must find the first kind, at its place, and let the second kind pass.

    python -m tests.parity.injected     # prints the table in docs/parity.md
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gemma2
from gemma2 import ops
from gemma2.model import ApplyRotary, GELUTanh, Gemma2, RMSNorm, SoftcapAttention, TiedHead
from gemma2.numerics import parts, with_numerics
from gemma2.parity.compare import Row, compare, first_difference, observed
from gemma2.research.sites import chosen, sites
from gemma2.twins import Make, on, replaced, sharing
from tests.conftest import SHAPES, tiny

TEXT = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. And the Spirit of God moved upon the face of the waters. "
) * 4

Inject = Callable[[Gemma2], object]  # changes the model it is given


def twins(make: Make) -> Inject:
    """Put twins in the place of modules, and leave them there."""
    return lambda model: replaced(model, make)


def at(paths: str, twin: Callable[[Any], nn.Module]) -> Make:
    """`twin(module)` for every module whose path fits this pattern."""
    return lambda path, module: twin(module) if fnmatch(path, paths) else None


def changed(twin: Callable[[Any], nn.Module], **others: Any) -> Callable[[Any], nn.Module]:
    """A twin in parts (see `gemma2/numerics/parts.py`) in which these functions are replaced."""

    def made(plain: nn.Module) -> nn.Module:
        new = twin(plain)
        for name, other in others.items():
            assert hasattr(new, name), f"{type(new).__name__} has no {name}"
            setattr(new, name, other)
        return new

    return made


class CapAfterMask(parts.ScoresInParts):
    def __init__(self, plain: SoftcapAttention) -> None:
        super().__init__(plain)
        self.softcap = nn.Identity()  # type: ignore[assignment]
        self.masked = lambda scores, visible: plain.softcap(parts.masked(scores, visible))


def narrow_gain(weight: Tensor) -> Tensor:
    """1 + weight in the parameter's dtype, as in litgpt."""
    return ops.upcast(1.0 + weight)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary pairs (2i, 2i + 1), as Llama's original code has them, instead of (i, i + c/2)."""
    half = x.shape[-1] // 2
    cos, sin = (each[..., :half].repeat_interleave(2, -1)[:, :, None] for each in (cos, sin))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


cap_after_mask = twins(on(SoftcapAttention, CapAfterMask))
interleaved_rotary = twins(on(ApplyRotary, changed(parts.ApplyRotaryInParts, apply_rotary=interleaved)))
erf_gelu = twins(on(GELUTanh, changed(parts.ActivationInParts, gelu=F.gelu)))


def no_final_cap(model: Gemma2) -> None:
    replaced(model, at("softcap", nn.Identity))


def no_score_cap(model: Gemma2) -> None:
    replaced(model, at("*.attend.softcap", nn.Identity))


def cap_on_hidden(model: Gemma2) -> None:
    """The cap on what the head reads instead of on the logits, as in torchtune."""
    replaced(model, on(TiedHead, changed(parts.HeadInParts, received=lambda x: ops.softcap(x, 30.0))))
    no_final_cap(model)


def other_kernels(model: Gemma2) -> None:
    """No mistake: products summed in float32, and every result rounded to bfloat16, as other kernels do it."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.float(), weight.float())  # the twin rounds it

    wide = changed(
        parts.ScoresInParts,
        product=lambda q, k: parts.matched(q.float(), k.float()),
        scaled_scores=lambda scores, scale: (scores * scale).bfloat16(),
        mixed=lambda pattern, v: (pattern.float() @ v.float()).bfloat16(),
    )
    replaced(model, on(nn.Linear, changed(parts.LinearInParts, product=product)))
    replaced(model, on(SoftcapAttention, wide))


# From here on a number or a weight is changed where it stands, in a copy: the module computes as before, so it needs no
# twin.


def window_one_wider(model: Gemma2) -> None:
    for module in model.modules():
        if isinstance(module, SoftcapAttention) and module.window is not None:
            module.window += 1


def layers_swapped(model: Gemma2) -> None:
    for layer in model.model.layers:
        attend = layer.self_attn.attend
        attend.window = None if attend.window else model.config.sliding_window


def post_norms_swapped(model: Gemma2) -> None:
    for layer in model.model.layers:
        first, second = layer.post_attention_layernorm, layer.post_feedforward_layernorm
        first.weight, second.weight = second.weight, first.weight


def scaled_by_width(model: Gemma2) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.scale = (model.config.hidden_size / model.config.num_attention_heads) ** -0.5


def unscaled_embedding(model: Gemma2) -> None:
    model.model.embed_tokens.scale = 1.0


def norm_read_twice(model: Gemma2) -> None:
    """A norm weight that already holds 1 + w, as a GGUF has it, with 1 added once more."""
    norm = model.get_submodule("model.layers.2.pre_feedforward_layernorm")
    norm.weight = nn.Parameter(norm.get_parameter("weight").detach() + 1)  # the old one may be another model's too


@dataclass(frozen=True)
class Bug:
    """A mistake, the site at which it must be found first, and the least that shows it."""

    inject: Inject
    first: str
    dtype: torch.dtype = torch.float32
    length: int = 64


BUGS = {
    "window off by one": Bug(window_one_wider, "blocks.0.attn.hook_attn_scores", length=160),
    "layers swapped": Bug(layers_swapped, "blocks.0.attn.hook_attn_scores", length=160),
    "cap after mask": Bug(cap_after_mask, "blocks.0.attn.hook_attn_scores"),
    "cap on the hidden state": Bug(cap_on_hidden, "logits_raw"),
    "cap on logits left out": Bug(no_final_cap, "logits"),
    "cap on scores left out": Bug(no_score_cap, "blocks.0.attn.hook_attn_scores"),
    "1 + w in the parameter's dtype": Bug(
        twins(on(RMSNorm, changed(parts.NormInParts, gain=narrow_gain))), "blocks.0.hook_attn_out", dtype=torch.bfloat16
    ),
    "1 added to a norm twice": Bug(norm_read_twice, "blocks.2.ln2"),
    "wrong query scale": Bug(scaled_by_width, "blocks.0.attn.hook_scores_raw"),
    "interleaved rotary": Bug(interleaved_rotary, "blocks.0.attn.hook_rot_q"),
    "swapped post-norms": Bug(post_norms_swapped, "blocks.0.hook_attn_out"),
    "unscaled embedding": Bug(unscaled_embedding, "hook_embed"),
    "erf GELU": Bug(erf_gelu, "blocks.0.mlp.hook_post"),
}


# What systems show, by patterns; the last three as this package's references of these names.
STREAM = ("blocks.?.hook_resid_post", "ln_final", "logits")
USUAL = (
    "hook_embed", "blocks.?.hook_*", "blocks.?.ln1", "blocks.?.ln2", "blocks.?.attn.hook_[qkvz]", "blocks.?.mlp.hook_*",
    "ln_final", "logits",
)  # fmt: skip
SHOWN = {
    "logits": ("logits",),
    "the residual stream": STREAM,
    "as transformers": (*USUAL, "blocks.?.attn.hook_rot_*", "blocks.?.attn.hook_pattern", "logits_raw"),
    "as gemma_pytorch": (*USUAL, "blocks.?.attn.hook_rot_k"),
    "as llama.cpp": (
        *USUAL, "blocks.?.attn.hook_rot_*", "blocks.?.attn.hook_scores_raw", "blocks.?.attn.hook_pattern",
        "blocks.?.ln*.hook_normalized", "ln_final.hook_normalized", "logits_raw",
    ),
}  # fmt: skip


def injected_rows(bug: Bug, gemma: gemma2.Gemma, shown: tuple[str, ...] = ("*",)) -> list[Row]:
    """What parity says of the pocket model with one mistake in it, of which these sites are shown."""
    model = copy.deepcopy(gemma.model).to(bug.dtype)
    ids = gemma.tokenizer.encode(TEXT)[: bug.length]
    broken = sharing(model)
    bug.inject(broken)
    return compare(model, ids, observed(broken, ids, chosen(model.config, shown)))


def sound_models(models: int = 54, length: int = 24) -> Iterator[tuple[str, Gemma2, Gemma2, list[int]]]:
    """Random bfloat16 models, the same computed otherwise, and rightly: with Google's arithmetic, which rounds at other
    places, or with products of another kernel; and token ids."""
    for number in range(models):
        size, seed = list(SHAPES)[number % 3], number // 3
        model = tiny(size, seed=seed).to(torch.bfloat16)
        ids = torch.randint(512, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        if number % 2:
            other = with_numerics(model, "gemma_pytorch")
        else:
            other = sharing(model)
            other_kernels(other)
        yield f"{size}, seed {seed}", model, other, ids


def sound_rows(models: int = 54, length: int = 24) -> Iterator[tuple[str, list[Row]]]:
    """What parity says of the sound models."""
    for name, model, other, ids in sound_models(models, length):
        yield name, compare(model, ids, observed(other, ids, sites(model.config)))


def main() -> None:
    gemma = gemma2.load(device="cpu", dtype="float32")
    print("| injected | dtype, token ids | called | first site | times what rounding explains |\n|---|---|---|---|---|")
    found = 0
    for name, bug in BUGS.items():
        first = first_difference(injected_rows(bug, gemma))
        found += first is not None
        dtype = str(bug.dtype).removeprefix("torch.")
        seen = "a difference" if first else "rounding"
        ratio = (first.why or f"{first.ratio:.3g}") if first else ""
        print(
            f"| {name} | {dtype}, {bug.length} | {seen} | {f'`{first.site}`' if first else ''} | {ratio} |", flush=True
        )
    print(f"\n| injected | {' | '.join(SHOWN)} |\n|---{'|---' * len(SHOWN)}|")
    for name, bug in BUGS.items():
        firsts = [first_difference(injected_rows(bug, gemma, shown)) for shown in SHOWN.values()]
        cells = [f"`{first.site.removeprefix('blocks.')}`" if first else "rounding" for first in firsts]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    highest = [max(row.ratio for row in rows) for _, rows in sound_rows()]
    wrong = sum(ratio > 1 for ratio in highest)
    print("\n| | called a difference | called rounding |\n|---|---|---|")
    print(f"| an injected bug | {found} | {len(BUGS) - found} |")
    print(f"| bfloat16 rounding in {len(highest)} random models | {wrong} | {len(highest) - wrong} |")
    print(f"\nThe highest of the {len(highest)} models' sites is {max(highest):.2f} times what rounding explains.")


if __name__ == "__main__":
    main()
