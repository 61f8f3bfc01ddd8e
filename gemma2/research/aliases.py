"""Other names of the sites: those of TransformerLens 3 and 4, short ones, and paths of modules as nnsight has them."""

from __future__ import annotations

import re
from typing import Any

# TransformerLens 3 names the inputs and outputs of modules; inside a block, and outside.
IN_BLOCK = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "ln1.hook_in": "hook_resid_pre",
    "ln1.hook_out": "ln1",
    "ln1_post.hook_out": "hook_attn_out",
    "ln2.hook_in": "hook_resid_mid",
    "ln2.hook_out": "ln2",
    "ln2_post.hook_out": "hook_mlp_out",
    "attn.hook_in": "ln1",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "mlp.hook_in": "ln2",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.in.hook_out": "mlp.hook_pre_linear",
    "mlp.out.hook_in": "mlp.hook_post",
    "hook_mlp_in": "hook_resid_mid",
}
OUTSIDE = {
    "embed.hook_out": "hook_embed",
    "ln_final.hook_out": "ln_final",
    "unembed.hook_in": "ln_final",
    "unembed.hook_out": "logits_raw",
}
# Paths of modules, whose output a site is: nnsight's `model.model.layers[3].mlp.gate_proj.output`.
MODULES = {
    "": "hook_resid_post",
    "input_layernorm": "ln1",
    "self_attn": "attn.hook_out",
    "self_attn.attend": "attn.hook_z",
    "post_attention_layernorm": "hook_attn_out",
    "pre_feedforward_layernorm": "ln2",
    "mlp.gate_proj": "mlp.hook_pre",
    "mlp.up_proj": "mlp.hook_pre_linear",
    "mlp": "mlp.hook_out",
    "post_feedforward_layernorm": "hook_mlp_out",
}
PATHS = {"model.embed_tokens": "hook_embed", "model.norm": "ln_final", "model": "ln_final", "lm_head": "logits_raw"}
# Short names, for `cache["resid_post", 5]`.
IN_ATTENTION = ("q", "k", "v", "z", "pattern", "attn_scores", "scores_raw", "rot_q", "rot_k", "result")
IN_MLP = ("pre", "pre_linear", "post")
OF_NORMS = ("inv_scale", "scale", "normalized")
LAYER = re.compile(r"(?:model\.)*layers(?:\.|\[)(\d+|\*)\]?(?:\.(.*))?")


def canonical(name: Any) -> str:
    """The site's own name for any of its names. Globs stay globs, and a name that is no alias stays as it is.

    Args:
        name: text; or (short name, layer) and (short name, layer, norm), as TransformerLens's caches take them:
            ("resid_post", 5), ("pattern", 5), ("normalized", 5, "ln1").
    """
    if isinstance(name, tuple):
        return _whole(*name)
    if not isinstance(name, str):
        raise ValueError(f"a site's name is text, or a short name with a layer, not {name!r}")
    found = LAYER.fullmatch(name.removesuffix(".output"))
    if found:
        layer, path = found[1], found[2] or ""
        return f"blocks.{layer}.{MODULES[path]}" if path in MODULES else name
    path = name.removesuffix(".output").replace("model.model", "model")
    if path in PATHS:
        return PATHS[path]
    if name in OUTSIDE:
        return OUTSIDE[name]
    head, _, rest = name.partition(".")
    layer, _, inside = rest.partition(".")
    return f"blocks.{layer}.{IN_BLOCK[inside]}" if head == "blocks" and inside in IN_BLOCK else name


def _whole(short: str, layer: int | str | None = None, norm: str | None = None) -> str:
    """A site's name from a short one, as TransformerLens's `get_act_name` makes it."""
    if short in OF_NORMS:
        if norm is None and layer is None:
            return f"ln_final.hook_{short}"
        return f"blocks.{layer}.{norm or 'ln1'}.hook_{short}"
    if layer is None:
        return f"hook_{short}" if short == "embed" else short
    if short in IN_ATTENTION:
        return f"blocks.{layer}.attn.hook_{short}"
    if short in IN_MLP:
        return f"blocks.{layer}.mlp.hook_{short}"
    return f"blocks.{layer}.hook_{short.removeprefix('hook_')}"
