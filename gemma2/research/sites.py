"""Every place of the forward pass that can be seen: TransformerLens's name for it, its shape, whose output it is.

One table, used by whatever observes, edits or compares. A site is always the output of a module, so a plain PyTorch
hook reaches it too. Names are TransformerLens's where it has one; new are `hook_scores_raw`, `hook_inv_scale` (the
reciprocal of its `hook_scale`), `ln1`, `ln2`, `ln_final`, `logits_raw` and `logits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.research.aliases import canonical

LAYER = "{i}"


@dataclass(frozen=True)
class Site:
    """A place, or the same place in every layer while its name holds {i}.

    Attributes:
        name: as in TransformerLens.
        module: the module whose output it is, by its path in `Gemma2` or, in the table, in its layer.
        shape: in the letters of `ops.py`.
        what: in words.
    """

    name: str
    module: str
    shape: str
    what: str

    def sizes(self, config: Gemma2Config, t: int) -> tuple[int, ...]:
        """The shape for one row of t tokens in one pass, batch axis included."""
        letters = {
            "b": 1,
            "t": t,
            "s": t,
            "d": config.hidden_size,
            "h": config.num_attention_heads,
            "g": config.num_key_value_heads,
            "c": config.head_dim,
            "f": config.intermediate_size,
            "v": config.vocab_size,
            "1": 1,
        }
        return tuple(letters[letter] for letter in self.shape.split())

    @property
    def axis(self) -> int:
        """Which axis is that of the tokens."""
        return self.shape.split().index("t")

    def take(self, value: Tensor, columns: Tensor) -> Tensor:
        """The values at some columns [b n] of the tokens' axis."""
        shape = [1] * value.ndim
        shape[0], shape[self.axis] = columns.shape
        return value.take_along_dim(columns.to(value.device).view(shape), dim=self.axis)

    @property
    def path(self) -> str:
        """The module's path in `Gemma2`, with {i} for the layer in the table's rows."""
        inside = LAYER in self.name
        return f"model.layers.{LAYER}.{self.module}".rstrip(".") if inside else self.module


# In the order in which a pass computes them.
TABLE = (
    Site("hook_embed", "model.embed_tokens", "b t d", "the embedding, times sqrt(d)"),
    Site("blocks.{i}.hook_resid_pre", "hook_resid_pre", "b t d", "the residual stream before the block"),
    Site("blocks.{i}.ln1.hook_inv_scale", "input_layernorm.hook_inv_scale", "b t 1", "1 / rms of the norm's input"),
    Site(
        "blocks.{i}.ln1.hook_normalized",
        "input_layernorm.hook_normalized",
        "b t d",
        "the norm's input times that scale, before the gain",
    ),
    Site("blocks.{i}.ln1", "input_layernorm", "b t d", "what attention reads"),
    Site("blocks.{i}.attn.hook_q", "self_attn.hook_q", "b t h c", "queries before rotation"),
    Site("blocks.{i}.attn.hook_k", "self_attn.hook_k", "b t g c", "keys before rotation"),
    Site("blocks.{i}.attn.hook_v", "self_attn.hook_v", "b t g c", "values"),
    Site("blocks.{i}.attn.hook_rot_q", "self_attn.hook_rot_q", "b t h c", "queries, rotated"),
    Site("blocks.{i}.attn.hook_rot_k", "self_attn.hook_rot_k", "b t g c", "keys, rotated"),
    Site(
        "blocks.{i}.attn.hook_scores_raw",
        "self_attn.attend.hook_scores_raw",
        "b h t s",
        "q @ k, scaled, before the cap",
    ),
    Site(
        "blocks.{i}.attn.hook_attn_scores", "self_attn.attend.hook_attn_scores", "b h t s", "after the cap and the mask"
    ),
    Site(
        "blocks.{i}.attn.hook_pattern",
        "self_attn.attend.hook_pattern",
        "b h t s",
        "attention weights: softmax of the scores",
    ),
    Site("blocks.{i}.attn.hook_z", "self_attn.attend.hook_z", "b t h c", "each head's weighted sum of values"),
    Site("blocks.{i}.attn.hook_out", "self_attn", "b t d", "attention's output, before its norm"),
    Site(
        "blocks.{i}.ln1_post.hook_inv_scale",
        "post_attention_layernorm.hook_inv_scale",
        "b t 1",
        "1 / rms of the norm's input",
    ),
    Site(
        "blocks.{i}.ln1_post.hook_normalized",
        "post_attention_layernorm.hook_normalized",
        "b t d",
        "the norm's input times that scale, before the gain",
    ),
    Site("blocks.{i}.hook_attn_out", "post_attention_layernorm", "b t d", "what attention adds to the residual stream"),
    Site("blocks.{i}.hook_resid_mid", "hook_resid_mid", "b t d", "the residual stream after attention"),
    Site(
        "blocks.{i}.ln2.hook_inv_scale",
        "pre_feedforward_layernorm.hook_inv_scale",
        "b t 1",
        "1 / rms of the norm's input",
    ),
    Site(
        "blocks.{i}.ln2.hook_normalized",
        "pre_feedforward_layernorm.hook_normalized",
        "b t d",
        "the norm's input times that scale, before the gain",
    ),
    Site("blocks.{i}.ln2", "pre_feedforward_layernorm", "b t d", "what the MLP reads"),
    Site("blocks.{i}.mlp.hook_pre", "mlp.gate_proj", "b t f", "the gate before GELU"),
    Site("blocks.{i}.mlp.hook_pre_linear", "mlp.up_proj", "b t f", "what GELU of the gate is multiplied by"),
    Site("blocks.{i}.mlp.hook_post", "mlp.hook_post", "b t f", "their product: GELU(gate) x hook_pre_linear"),
    Site("blocks.{i}.mlp.hook_out", "mlp", "b t d", "the MLP's output, before its norm"),
    Site(
        "blocks.{i}.ln2_post.hook_inv_scale",
        "post_feedforward_layernorm.hook_inv_scale",
        "b t 1",
        "1 / rms of the norm's input",
    ),
    Site(
        "blocks.{i}.ln2_post.hook_normalized",
        "post_feedforward_layernorm.hook_normalized",
        "b t d",
        "the norm's input times that scale, before the gain",
    ),
    Site("blocks.{i}.hook_mlp_out", "post_feedforward_layernorm", "b t d", "what the MLP adds to the residual stream"),
    Site("blocks.{i}.hook_resid_post", "", "b t d", "the residual stream after the block"),
    Site("ln_final.hook_inv_scale", "model.norm.hook_inv_scale", "b t 1", "1 / rms of the norm's input"),
    Site(
        "ln_final.hook_normalized",
        "model.norm.hook_normalized",
        "b t d",
        "the norm's input times that scale, before the gain",
    ),
    Site("ln_final", "model.norm", "b t d", "what the head reads"),
    Site("logits_raw", "lm_head", "b t v", "the head's output, before the cap"),
    Site("logits", "softcap", "b t v", "after the cap: what the model returns"),
)


def listing() -> list[tuple[str, str, str, str]]:
    """The table for people: name, shape, module, words; those after the first row are one a site."""
    rows = [(site.name, f"[{site.shape}]", site.path, site.what) for site in TABLE]
    return [("site", "shape", "output of", "what it is"), *rows]


def sites(config: Gemma2Config) -> dict[str, Site]:
    """Every site of a model of so many layers by its name, in the order of computation."""
    return dict(_of_layers(config.num_hidden_layers))


@lru_cache(maxsize=16)
def _of_layers(layers: int) -> dict[str, Site]:
    inside = [site for site in TABLE if LAYER in site.name]
    first = TABLE.index(inside[0])
    listed = list(TABLE[:first])
    for layer in range(layers):
        listed += [_in_layer(site, layer) for site in inside]
    listed += TABLE[first + len(inside) :]
    return {site.name: site for site in listed}


def _in_layer(site: Site, layer: int) -> Site:
    return replace(site, name=site.name.replace(LAYER, str(layer)), module=site.path.replace(LAYER, str(layer)))


def in_table(name: str) -> Site:
    """The row of the table for a site's name, of any layer. Raises KeyError for another name."""
    parts = name.split(".")
    general = ".".join([parts[0], LAYER, *parts[2:]]) if parts[0] == "blocks" else name
    return {site.name: site for site in TABLE}[general]


def chosen(config: Gemma2Config, patterns: Iterable[str] | str = "*") -> dict[str, Site]:
    """The sites that any of the patterns names, in the order of computation.

    Args:
        patterns: names; shell globs, as `blocks.*.hook_resid_*`; or names of TransformerLens 3 and paths of modules, as
            `gemma2.research.aliases` lists them.
    Raises:
        ValueError: a pattern that names none; says which names are near.
    """
    known = sites(config)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    wanted = [canonical(pattern) for pattern in wanted]
    exact = known.keys() & set(wanted)
    globs = [pattern for pattern in wanted if pattern not in exact]
    for pattern in globs:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"no site is called {pattern!r}{_near(pattern, config)}")
    return {
        name: site
        for name, site in known.items()
        if name in exact or any(fnmatchcase(name, pattern) for pattern in globs)
    }


def missing(name: str, kept: Sequence[str]) -> str:
    """What to say of a name that is not among the sites that were kept."""
    try:
        in_table(name)
    except KeyError:
        return f"no site is called {name!r} (gemma2 trace --list shows all)"
    return f"{name} was not captured; captured were {', '.join(kept[:4])}{' ...' if len(kept) > 4 else ''}"


def _near(pattern: str, config: Gemma2Config) -> str:
    """What was perhaps meant."""
    layers, parts = config.num_hidden_layers, pattern.split(".")
    if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdecimal() and int(parts[1]) >= layers:
        return f": this model has layers 0 to {layers - 1}"
    near = get_close_matches(pattern, sites(config), n=3, cutoff=0.5)
    said = ", ".join(near) or "hook_embed, blocks.0.hook_resid_post, blocks.0.attn.hook_pattern"
    return f"; near are {said} (gemma2 trace --list shows all)"
