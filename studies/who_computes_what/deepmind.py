"""google-deepmind/gemma, which is JAX: a recipe that builds it by its own code. Run by its own Python."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from studies.who_computes_what.given import Built, Given, Values, spans


def deepmind(given: Given, compiled: str = "yes") -> Built:
    """Its `Transformer`, which compiles itself; with `compiled=no` JAX runs operation by operation. As by its sampler,
    positions and mask are handed in: left to itself, it takes id 0 for padding."""
    said, jax, linen = given.config, import_module("jax"), import_module("flax.linen")
    heads, groups, width = said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]
    own, kind = import_module("gemma.gm.nn._config"), import_module("gemma.gm.nn._modules").AttentionType
    scales = {width: "BY_ONE_OVER_SQRT_HEAD_DIM"}
    scales[said["hidden_size"] // heads] = "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS"
    config = own.TransformerConfig(
        num_embed=said["vocab_size"],
        embed_dim=said["hidden_size"],
        hidden_dim=said["intermediate_size"],
        num_heads=heads,
        head_dim=width,
        num_kv_heads=groups,
        final_logit_softcap=said["final_logit_softcapping"],
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kind.LOCAL_SLIDING, kind.GLOBAL) * (said["num_hidden_layers"] // 2),  # as its Gemma2_27B
        query_pre_attn_norm=own.QueryPreAttentionNormalisation[scales[said["query_pre_attn_scalar"]]],
        attn_logits_soft_cap=said["attn_logit_softcapping"],
        sliding_window_size=said["sliding_window"],
        transpose_gating_einsum=True,
    )
    dtype = jax.numpy.dtype(str(given.dtype).removeprefix("torch."))
    model = import_module("gemma.gm.nn._transformer").Transformer(config=config, tokens="tokens", dtype=dtype)

    def array(value: Tensor) -> Any:
        return jax.numpy.asarray(value.float().contiguous().numpy()).astype(dtype)  # there and back: exact

    weights = given.weights()
    tree: dict[str, Any] = {
        "embedder": {"input_embedding": array(weights["model.embed_tokens.weight"])},
        "final_norm": {"scale": array(weights["model.norm.weight"])},
    }
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    for i in given.layers():
        of = {name.split(".", 3)[3]: value for name, value in weights.items() if name.startswith(f"model.layers.{i}.")}
        q, k, v = (of[f"self_attn.{x}_proj.weight"].unflatten(0, (-1, width)).transpose(1, 2) for x in "qkv")
        read = {"q_einsum": {"w": array(q)}, "kv_einsum": {"w": array(torch.stack((k, v)))}}
        if heads == groups:
            read = {"qkv_einsum": {"w": array(torch.stack((q, k, v)))}}
        tree[f"layer_{i}"] = {
            "attn": {
                **read,
                "attn_vec_einsum": {"w": array(of["self_attn.o_proj.weight"].T.unflatten(0, (heads, -1)))},
            },
            "mlp": {
                "gating_einsum": array(torch.stack((of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]))),
                "linear": array(of["mlp.down_proj.weight"].T),
            },
            **{theirs: {"scale": array(of[f"{ours}.weight"])} for theirs, ours in norms.items()},
        }

    def tensor(value: Any) -> Tensor:
        return torch.from_numpy(import_module("numpy").array(value.astype("float32"))).to(given.dtype)

    def keep(call: Callable[..., Any], arguments: Any, options: Any, context: Any) -> Any:
        """What a module is given and puts out, and also what the embedder's `encode` and `decode` do."""
        output, module = call(*arguments, **options), context.module
        if module.path and context.method_name in ("__call__", "encode", "decode"):
            name = "_".join((*[x for x in arguments if isinstance(x, str)], context.method_name))
            module.sow("intermediates", f"{name} of", next(x for x in arguments if not isinstance(x, str)))
            module.sow("intermediates", name, output)
        return output

    def handed(tokens: Tensor, start: int, slots: int) -> dict[str, Any]:
        stop = start + tokens.shape[1]
        causal = torch.ones(slots, slots, dtype=torch.bool).tril()[None, start:stop]
        numbers = {"tokens": tokens, "positions": torch.arange(start, stop)[None]}
        arrays = {name: jax.numpy.asarray(value.numpy(), "int32") for name, value in numbers.items()}
        return {**arrays, "attention_mask": jax.numpy.asarray(causal.numpy())}

    def run(tokens: Tensor) -> Values:
        plain = contextlib.nullcontext() if compiled == "yes" else jax.disable_jit()
        with plain, linen.intercept_methods(keep):
            given_in = handed(tokens, 0, tokens.shape[1])
            output, state = model.apply({"params": tree}, **given_in, mutable=["intermediates"])

        def at(*path: str) -> Any:
            place = state["intermediates"]
            for name in path:
                place = place[name]
            return place[0]

        call = "__call__"
        found = {"hook_embed": at("embedder", "encode"), "ln_final": at("final_norm", call)}
        for i in given.layers():
            layer, block = f"layer_{i}", f"blocks.{i}."
            if heads == groups:
                q, k, v = at(layer, "attn", "qkv_einsum", f"BTD,SNDH->SBTNH_{call}")
            else:
                q = at(layer, "attn", "q_einsum", f"BTD,NDH->BTNH_{call}")
                k, v = at(layer, "attn", "kv_einsum", f"BSD,CKDH->CBSKH_{call}")
            gate = at(layer, "mlp", f"...F,NHF->...NH_{call}")
            found |= {
                f"{block}ln1": at(layer, "pre_attention_norm", call),
                f"{block}attn.hook_q": q,
                f"{block}attn.hook_k": k,
                f"{block}attn.hook_v": v,
                f"{block}attn.hook_pattern": at(layer, "attn", "attention_weights", call).swapaxes(1, 2),
                f"{block}attn.hook_z": at(layer, "attn", "attn_vec_einsum", f"BTNH,NHD->BTD_{call} of"),
                f"{block}hook_attn_out": at(layer, "post_attention_norm", call),
                f"{block}hook_resid_mid": at(layer, "pre_ffw_norm", f"{call} of"),
                f"{block}ln2": at(layer, "pre_ffw_norm", call),
                f"{block}mlp.hook_pre": gate[..., 0, :],
                f"{block}mlp.hook_pre_linear": gate[..., 1, :],
                f"{block}mlp.hook_post": at(layer, "mlp", f"...H,HF->...F_{call} of"),
                f"{block}hook_mlp_out": at(layer, "post_ffw_norm", call),
                f"{block}hook_resid_post": at(layer, call)[1],
            }
        found |= {"logits_raw": at("embedder", "decode"), "logits": output.logits}
        return {site: tensor(value) for site, value in found.items()}

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        cache, parts = model.init_cache(batch_size=1, dtype=dtype, cache_length=given.longest), []
        for a, b in spans(chunks):
            output = model.apply({"params": tree}, **handed(tokens[:, a:b], a, given.longest), cache=cache)
            cache = output.cache
            parts.append(tensor(output.logits))
        return torch.cat(parts, dim=1)

    how = "compiled" if compiled == "yes" else "not compiled"
    flags = os.environ.get("XLA_FLAGS", "")
    return Built(f"gemma {version('gemma')}, jax {version('jax')}, {how}{flags and f', {flags}'}", run, cached)
