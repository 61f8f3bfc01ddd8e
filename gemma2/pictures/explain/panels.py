"""The words of the page that `explain` writes: for each panel a title, what happens there, and the line of code."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma2.research.sites import LAYER


@dataclass(frozen=True)
class Panel:
    """One place of the forward pass, as the page shows it.

    Attributes:
        name: a site's, with {i} for the layer in the tables below; or a name of its own for what is no site.
        title: in the side's navigation too.
        says: what happens there, in one or two sentences; holds fields for the numbers of the config.
        owner: the class in model.py (for the tokens, in tokenizer.py) with the line.
        line: of that class.
        draws: the function in panels.js that draws it.
        beside: other sites that it draws: for a norm its input, for a sum its parts.
        module: whose output it is, by its path in `Gemma2`, or, in the tables below, in its layer; a site's is known.
    """

    name: str
    title: str
    says: str
    owner: str
    line: str
    draws: str
    beside: tuple[str, ...] = ()
    module: str = ""


INVERSE = "normalized = self.hook_normalized(wide * self.hook_inv_scale(ops.inverse_rms(wide, self.eps)))"
GAIN = "return (normalized * (1.0 + ops.upcast(self.weight))).to(x.dtype)"
GEGLU = "return self.down_proj(self.hook_post(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))"
ADDED = "return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))"


def _norm(name: str, source: str, output: str, title: str, why: str) -> list[Panel]:
    """A norm's three sites: its scale, the normalized vector, and that times the gain."""
    return [
        Panel(f"{name}.hook_inv_scale", f"{title}: the scale", why, "RMSNorm", INVERSE, "scale"),
        Panel(
            f"{name}.hook_normalized",
            f"{title}: normalized",
            "The vector times that scale. Its root mean square is now 1, whatever it was before.",
            "RMSNorm",
            INVERSE,
            "normalized",
            (source, f"{name}.hook_inv_scale"),
        ),
        Panel(
            output,
            f"{title}: times the gain",
            "Each of the {d} numbers is multiplied by its own gain, which was learned. Gemma stores the gain minus "
            "one, so a stored weight of 0 changes nothing.",
            "RMSNorm",
            GAIN,
            "gain",
            (f"{name}.hook_normalized",),
        ),
    ]


BEFORE = [
    Panel(
        "tokens",
        "Tokens",
        "The tokenizer cuts the text into pieces and gives each piece its number. A beginning-of-sequence token, BOS, "
        "always stands first: without it Gemma 2's predictions are worthless.",
        "Tokenizer",
        "def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:",
        "tokens",
    ),
    Panel(
        "hook_embed",
        "Embedding",
        "Each id picks its row of a table of {v} rows. The row is multiplied by the square root of the width {d}, "
        "rounded to the dtype of the weights. The same table is the head at the end, there without that factor.",
        "ScaledEmbedding",
        'return F.embedding(tokens, self.weight) * torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu")',
        "embedding",
    ),
    Panel(
        "layers",
        "Through the layers",
        "{n} layers follow, {locals} local and {globals} global. Each adds two vectors to a token's own: what "
        "attention collected, and what the MLP made of it. Their lengths are drawn for the chosen token.",
        "Gemma2Model",
        "x = layer(x, positions, rotary, slots)",
        "layers",
        module="model.layers",
    ),
]
BLOCK = f"blocks.{LAYER}"
IN_LAYER = [
    Panel(
        f"{BLOCK}.hook_resid_pre",
        "Residual stream, before",
        "Each token has one vector of {d} numbers that runs through all layers: the residual stream. Layers read it "
        "and add to it, and nothing else changes it. This is what it holds before layer {i}.",
        "Block",
        "x = self.hook_resid_pre(x)",
        "vectors",
    ),
    *_norm(
        f"{BLOCK}.ln1",
        f"{BLOCK}.hook_resid_pre",
        f"{BLOCK}.ln1",
        "Norm before attention",
        "Attention reads a normalized copy of the stream. The norm measures each token's vector by its root mean "
        "square (rms), and multiplies all of the vector by 1 / rms: only its direction counts.",
    ),
    Panel(
        f"{BLOCK}.attn.hook_q",
        "Queries",
        "Each of the {h} query heads makes {c} numbers of the normalized vector: what this token looks for.",
        "Attention",
        "q = self.hook_q(self.q_proj(x).view(heads))",
        "heads",
    ),
    Panel(
        f"{BLOCK}.attn.hook_k",
        "Keys",
        "{g} key heads make what a token offers to those that look. Each key head serves {group} query heads.",
        "Attention",
        "k = self.hook_k(self.k_proj(x).view(heads))",
        "heads",
    ),
    Panel(
        f"{BLOCK}.attn.hook_v",
        "Values",
        "{g} value heads make what a token hands on to those that look at it. Values are not rotated.",
        "Attention",
        "v = self.hook_v(self.v_proj(x).view(heads))",
        "heads",
    ),
    Panel(
        f"{BLOCK}.attn.hook_rot_q",
        "Rotation of the queries",
        "Numbers i and i + {half} of a head are a point in a plane. It is turned by an angle that grows with the "
        "token's position: pair 0 by one radian per position, later pairs more slowly.",
        "Attention",
        "q = self.hook_rot_q(self.apply_rotary(q, *rotary))",
        "rotation",
        (f"{BLOCK}.attn.hook_q",),
    ),
    Panel(
        f"{BLOCK}.attn.hook_rot_k",
        "Rotation of the keys",
        "Keys turn by the same angles. In the product of a query and a key only the difference of the angles is left, "
        "so a score depends on how far apart the two tokens are.",
        "Attention",
        "k = self.hook_rot_k(self.apply_rotary(k, *rotary))",
        "rotation",
        (f"{BLOCK}.attn.hook_k",),
    ),
    Panel(
        f"{BLOCK}.attn.hook_scores_raw",
        "Raw scores",
        "A score is the product of a query and a key, times {qscale} ({scalar} to the power -1/2). It says how well "
        "what one token offers fits what the other looks for. Pairs that the mask will hide still have a score here.",
        "SoftcapAttention",
        "scores = self.hook_scores_raw(q @ k.transpose(2, 3) * self.scale)",
        "scores",
    ),
    Panel(
        f"{BLOCK}.cap",
        "The cap on scores",
        "Every score becomes {cap} tanh(score / {cap}), so that none leaves the range from -{cap} to {cap}. Scores "
        "near 0 stay almost as they are; the nearer one is to the cap, the more it is bent.",
        "SoftCap",
        "return ops.softcap(x, self.cap)",
        "cap",
        (f"{BLOCK}.attn.hook_scores_raw",),
        "self_attn.attend.softcap",
    ),
    Panel(
        f"{BLOCK}.mask",
        "The mask",
        "{mask}",
        "SoftcapAttention",
        "visible = ops.visible(positions, self.hook_key_positions(key_positions), self.window)",
        "mask",
        module="self_attn.attend",
    ),
    Panel(
        f"{BLOCK}.attn.hook_attn_scores",
        "Scores, capped and masked",
        "First the cap, then the mask: a pair that is hidden gets the lowest number there is, and softmax will make "
        "that exactly 0.",
        "SoftcapAttention",
        "scores = self.softcap(scores).masked_fill(~visible, torch.finfo(scores.dtype).min)",
        "masked",
        (f"{BLOCK}.attn.hook_scores_raw",),
    ),
    Panel(
        f"{BLOCK}.attn.hook_pattern",
        "The pattern",
        "Softmax turns each row of scores into weights that sum to 1. They say where each token looks.",
        "SoftcapAttention",
        "pattern = ops.upcast(self.hook_attn_scores(scores)).softmax(dim=-1).to(q.dtype)",
        "pattern",
    ),
    Panel(
        f"{BLOCK}.attn.hook_z",
        "What each head collects",
        "Each head adds up the values of the tokens it looks at, each times its weight in the pattern.",
        "SoftcapAttention",
        "z = self.hook_pattern(pattern) @ v",
        "heads",
    ),
    Panel(
        f"{BLOCK}.attn.hook_out",
        "o_proj",
        "One matrix, o_proj, mixes what the {h} heads collected ({h} x {c} = {hc} numbers) into one vector as wide as "
        "the stream, {d}.",
        "Attention",
        "return self.o_proj(z.flatten(2))",
        "vectors",
    ),
    *_norm(
        f"{BLOCK}.ln1_post",
        f"{BLOCK}.attn.hook_out",
        f"{BLOCK}.hook_attn_out",
        "Norm after attention",
        "Most models add attention's output to the stream as it is. Gemma 2 normalizes it once more, so its own gain "
        "alone decides how much is added.",
    ),
    Panel(
        f"{BLOCK}.hook_resid_mid",
        "Attention is added",
        "The stream before, plus what attention adds. The token keeps what it knew and gains what it collected.",
        "Block",
        "x = self.hook_resid_mid(x + self.post_attention_layernorm(attention))",
        "sum",
        (f"{BLOCK}.hook_resid_pre", f"{BLOCK}.hook_attn_out"),
    ),
    *_norm(
        f"{BLOCK}.ln2",
        f"{BLOCK}.hook_resid_mid",
        f"{BLOCK}.ln2",
        "Norm before the MLP",
        "The second half of the layer reads a normalized copy too. From here on each token is worked on alone.",
    ),
    Panel(
        f"{BLOCK}.mlp.hook_pre",
        "MLP: the gate",
        "gate_proj makes {f} numbers, one a neuron. GELU lets those above 0 through and holds back most of the others.",
        "MLP",
        GEGLU,
        "gelu",
    ),
    Panel(
        f"{BLOCK}.mlp.hook_pre_linear",
        "MLP: what passes the gate",
        "up_proj makes {f} more numbers from the same vector. Each is multiplied by GELU of its gate.",
        "MLP",
        GEGLU,
        "spread",
    ),
    Panel(
        f"{BLOCK}.mlp.hook_post",
        "MLP: the product",
        "GELU(gate) times the number beside it. Where the gate is shut the product is near 0, whatever the number was.",
        "MLP",
        GEGLU,
        "product",
        (f"{BLOCK}.mlp.hook_pre", f"{BLOCK}.mlp.hook_pre_linear"),
    ),
    Panel(
        f"{BLOCK}.mlp.hook_out",
        "MLP: down_proj",
        "One matrix, down_proj, makes a vector as wide as the stream of the {f} products.",
        "MLP",
        GEGLU,
        "vectors",
    ),
    *_norm(
        f"{BLOCK}.ln2_post",
        f"{BLOCK}.mlp.hook_out",
        f"{BLOCK}.hook_mlp_out",
        "Norm after the MLP",
        "The fourth norm of the layer. It too is Gemma 2's own: the MLP's output is normalized before it is added.",
    ),
    Panel(
        f"{BLOCK}.hook_resid_post",
        "The MLP is added",
        "The stream after attention, plus what the MLP adds. The next layer begins with this.",
        "Block",
        ADDED,
        "sum",
        (f"{BLOCK}.hook_resid_mid", f"{BLOCK}.hook_mlp_out"),
    ),
]
AFTER = [
    *_norm(
        "ln_final",
        "stream",
        "ln_final",
        "Final norm",
        "All layers have added their part. One last norm prepares the stream for the head.",
    ),
    Panel(
        "logits_raw",
        "Raw logits",
        "The head is the embedding table again, read backwards: the product with each of its {v} rows is that token's "
        "raw logit.",
        "TiedHead",
        "return F.linear(x, embedding.weight)",
        "logits",
    ),
    Panel(
        "logits",
        "The final cap",
        "Each logit becomes {final} tanh(logit / {final}). The order of the tokens stays, but high logits move closer "
        "together, so the model is less sure than its raw logits say.",
        "Gemma2",
        "return self.softcap(self.lm_head(hidden, self.model.embed_tokens))",
        "final",
    ),
    Panel(
        "next",
        "The next token",
        "Softmax turns the {v} logits into probabilities. These are the ten likeliest tokens to come after the chosen "
        "one, and how likely each would be without the final cap.",
        "Gemma2",
        "return self.softcap(self.lm_head(hidden, self.model.embed_tokens))",
        "next",
        module="softcap",
    ),
]


def in_layer(layer: int) -> list[Panel]:
    """The panels of one layer, in the order of computation."""
    found = []
    for panel in IN_LAYER:
        name, *beside = (one.replace(LAYER, str(layer)) for one in (panel.name, *panel.beside))
        module = panel.module and f"model.layers.{layer}.{panel.module}"
        found.append(replace(panel, name=name, beside=tuple(beside), module=module))
    return found
