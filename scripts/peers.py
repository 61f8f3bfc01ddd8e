"""Other people's Gemma 2, each built by its own code with the weights of a folder and run on given ids.

    python scripts/peers.py RECIPE FOLDER OUT DTYPE [OPTION=VALUE ...]

`who_computes_what.py` runs this with the peer's own Python, so nothing but the peer, torch and safetensors is imported.
FOLDER holds config.json, model.safetensors in Hugging Face's names, model.gguf if it is asked for, and ids.json: the
runs, as name -> {ids, chunks}. OUT gets a trace of each run (RUN.safetensors), or what the peer said instead (RUN.txt).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Values = dict[str, Tensor]
# A block's two contributions and its end, in Hugging Face's names for the modules.
HUGGING_FACE = {
    "blocks.{i}.hook_attn_out": "model.layers.{i}.post_attention_layernorm",
    "blocks.{i}.hook_mlp_out": "model.layers.{i}.post_feedforward_layernorm",
    "blocks.{i}.hook_resid_post": "model.layers.{i}",
    "ln_final": "model.norm",
}


@dataclass(frozen=True)
class Peer:
    """A peer with its weights.

    Attributes:
        system: who it is, with its version.
        run: tokens [1 t] in one pass -> site -> value, with the batch axis.
        cached: tokens [1 t] in chunks of these lengths, with the peer's own cache -> logits [1 t v].
    """

    system: str
    run: Callable[[Tensor], Values]
    cached: Callable[[Tensor, list[int]], Tensor] | None


@dataclass(frozen=True)
class Given:
    """What every recipe is given."""

    folder: Path
    config: Mapping[str, Any]
    dtype: torch.dtype
    longest: int  # ids in any run

    def weights(self) -> Values:
        return {name: value.to(self.dtype) for name, value in load_file(self.folder / "model.safetensors").items()}

    def layers(self) -> range:
        return range(self.config["num_hidden_layers"])


def watched(model: nn.Module, places: Mapping[str, str], layers: Iterable[int], run: Callable[[], Tensor]) -> Values:
    """The outputs of modules during `run`, which gives the logits. `places`: site -> module, with {i} for the layer."""
    seen: Values = {}

    def hook(site: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[site] = output[0] if isinstance(output, tuple) else output

        return see

    for site, path in places.items():
        for i in layers if "{i}" in site else [0]:
            module = model.get_submodule(path.replace("{i}", str(i)))
            module.register_forward_hook(hook(site.replace("{i}", str(i))))
    seen["logits"] = run()
    for module in model.modules():
        module._forward_hooks.clear()
    return seen


def spans(chunks: Iterable[int]) -> Iterable[tuple[int, int]]:
    start = 0
    for length in chunks:
        yield start, start + length
        start += length


def transformers_(given: Given, attention: str = "eager", gguf: str = "") -> Peer:
    transformers = import_module("transformers")
    number = tuple(map(int, transformers.__version__.split(".")[:2]))
    options = {"dtype" if number >= (4, 56) else "torch_dtype": given.dtype, "attn_implementation": attention}
    if gguf:
        options["gguf_file"] = gguf
    model = transformers.Gemma2ForCausalLM.from_pretrained(given.folder, **options).eval()

    def run(tokens: Tensor) -> Values:
        return watched(model, HUGGING_FACE, given.layers(), lambda: model(tokens, use_cache=False).logits)

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        hybrid = number < (4, 54)  # the cache that its generate() made for Gemma 2
        if hybrid:
            cache = import_module("transformers.cache_utils").HybridCache(
                model.config, 1, given.longest, device="cpu", dtype=given.dtype
            )
        else:
            cache = transformers.DynamicCache(config=model.config)
        parts = []
        for start, stop in spans(chunks):
            where = {"cache_position": torch.arange(start, stop)} if hybrid else {}
            parts.append(model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **where).logits)
        return torch.cat(parts, dim=1)

    how = f"GGUF, {attention}" if gguf else attention
    return Peer(f"transformers {transformers.__version__} {how}", run, cached)


def nnsight(given: Given) -> Peer:
    model = import_module("nnsight").LanguageModel(
        str(given.folder), dispatch=True, dtype=given.dtype, attn_implementation="eager"
    )

    layers = len(given.layers())

    def run(tokens: Tensor) -> Values:
        ends: list[Tensor] = []
        with model.trace(tokens):
            for i in range(layers):  # it runs these lines elsewhere: names must be plain
                ends.append(model.model.layers[i].output.save())
            last = model.model.norm.output.save()
            logits = model.output.logits.save()
        return {
            **{f"blocks.{i}.hook_resid_post": end for i, end in enumerate(ends)},
            "ln_final": last,
            "logits": logits,
        }

    return Peer(f"nnsight {version('nnsight')} with transformers {version('transformers')}", run, None)


def litgpt(given: Given) -> Peer:
    said = given.config
    own = import_module("litgpt.config").Config.from_name("Gemma-2-27b")
    config = import_module("litgpt.config").Config.from_name(
        "Gemma-2-27b",
        n_layer=said["num_hidden_layers"],
        n_embd=said["hidden_size"],
        intermediate_size=said["intermediate_size"],
        n_head=said["num_attention_heads"],
        n_query_groups=said["num_key_value_heads"],
        head_size=said["head_dim"],
        attention_scores_scalar=said["query_pre_attn_scalar"],
        vocab_size=said["vocab_size"],
        padded_vocab_size=said["vocab_size"],
        block_size=said["max_position_embeddings"],
        sliding_window_size=said["sliding_window"],
        sliding_window_indices=own.sliding_window_indices[: said["num_hidden_layers"]],  # its own order of layers
    )
    model = import_module("litgpt.model").GPT(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(given.dtype)
    given_weights = given.weights()
    weights = {
        "lm_head.weight": given_weights["model.embed_tokens.weight"],
        "transformer.wte.weight": given_weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": given_weights["model.norm.weight"],
    }
    names = {
        "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
        "norm_1": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "norm_2": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }
    for i in given.layers():
        theirs, ours = f"transformer.h.{i}", f"model.layers.{i}"
        heads = [given_weights[f"{ours}.self_attn.{x}_proj.weight"] for x in "qkv"]
        weights[f"{theirs}.attn.qkv.weight"] = torch.cat(heads)
        weights |= {f"{theirs}.{a}.weight": given_weights[f"{ours}.{b}.weight"] for a, b in names.items()}
    model.load_state_dict(weights, strict=True)
    places = {
        "blocks.{i}.hook_attn_out": "transformer.h.{i}.post_attention_norm",
        "blocks.{i}.hook_mlp_out": "transformer.h.{i}.post_mlp_norm",
        "blocks.{i}.hook_resid_post": "transformer.h.{i}",
        "ln_final": "transformer.ln_f",
    }

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        model.max_seq_length = given.longest
        model.set_kv_cache(batch_size=1, dtype=given.dtype)
        try:
            parts = [model(tokens[:, a:b], input_pos=torch.arange(a, b)) for a, b in spans(chunks)]
        finally:
            model.clear_kv_cache()
        return torch.cat(parts, dim=1)

    return Peer(
        f"litgpt {version('litgpt')}",
        lambda tokens: watched(model, places, given.layers(), lambda: model(tokens)),
        cached,
    )


def torchtune(given: Given) -> Peer:
    said = given.config
    gemma2 = import_module("torchtune.models.gemma2")
    heads = {"num_heads": said["num_attention_heads"], "num_kv_heads": said["num_key_value_heads"]}
    model = gemma2.gemma2(
        vocab_size=said["vocab_size"],
        num_layers=said["num_hidden_layers"],
        **heads,
        head_dim=said["head_dim"],
        embed_dim=said["hidden_size"],
        intermediate_dim=said["intermediate_size"],
        max_seq_len=said["max_position_embeddings"],
        norm_eps=said["rms_norm_eps"],
        rope_base=int(said["rope_theta"]),
        hidden_capping_value=30.0,  # as its gemma2_27b() has them
        final_capping_value=50.0,
        sliding_window_size=said["sliding_window"],
        query_pre_attn_scalar=said["query_pre_attn_scalar"],
    )
    convert = import_module("torchtune.models.gemma2._convert_weights").gemma2_hf_to_tune
    size = {"dim": said["hidden_size"], "head_dim": said["head_dim"]}
    model.load_state_dict(convert(given.weights(), **heads, **size), strict=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(given.dtype)
    model.eval()
    places = {
        "blocks.{i}.hook_attn_out": "layers.{i}.sa_scale",
        "blocks.{i}.hook_mlp_out": "layers.{i}.mlp_scale",
        "blocks.{i}.hook_resid_post": "layers.{i}",
    }

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        """As its generation does: a causal mask over the whole cache, and the rows of it that are computed."""
        causal = torch.ones(given.longest, given.longest, dtype=torch.bool).tril()[None]
        if not model.caches_are_setup():
            model.setup_caches(1, given.dtype, decoder_max_seq_len=given.longest)
        model.reset_caches()
        parts = [
            model(tokens[:, a:b], mask=causal[:, a:b], input_pos=torch.arange(a, b)[None]) for a, b in spans(chunks)
        ]
        return torch.cat(parts, dim=1)

    return Peer(
        f"torchtune {version('torchtune')}",
        lambda tokens: watched(model, places, given.layers(), lambda: model(tokens)),
        cached,
    )


def transformer_lens(given: Given) -> Peer:
    """Its HookedTransformer, with the numbers it has for Gemma 2 itself but for sizes."""
    said, lens = given.config, import_module("transformer_lens")
    numbers = import_module("transformer_lens.loading_from_pretrained").convert_hf_model_config("google/gemma-2-27b")
    numbers |= {
        "d_model": said["hidden_size"],
        "d_head": said["head_dim"],
        "n_heads": said["num_attention_heads"],
        "d_mlp": said["intermediate_size"],
        "n_layers": said["num_hidden_layers"],
        "n_ctx": said["max_position_embeddings"],
        "d_vocab": said["vocab_size"],
        "n_key_value_heads": said["num_key_value_heads"],
        "window_size": said["sliding_window"],
        "attn_scale": said["query_pre_attn_scalar"] ** 0.5,
        "rotary_dim": said["head_dim"],
        "dtype": given.dtype,
        "tokenizer_name": None,
    }
    model = lens.HookedTransformer(lens.HookedTransformerConfig.from_dict(numbers))
    source = import_module("transformers").Gemma2ForCausalLM.from_pretrained(given.folder, torch_dtype=given.dtype)
    convert = import_module("transformer_lens.pretrained.weight_conversions.gemma").convert_gemma_weights
    processing = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(convert(source, model.cfg), **dict.fromkeys(processing, False))
    model.eval()
    ends = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")

    def run(tokens: Tensor) -> Values:
        logits, seen = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(ends))
        return {**dict(seen.items()), "logits": logits}

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        cache = lens.past_key_value_caching.HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 1)
        ones = torch.ones_like(tokens)  # without a tokenizer it does not know that nothing is padding
        parts = [model(tokens[:, a:b], past_kv_cache=cache, attention_mask=ones[:, a:b]) for a, b in spans(chunks)]
        return torch.cat(parts, dim=1)

    return Peer(f"TransformerLens {version('transformer-lens')} HookedTransformer", run, cached)


def llama_cpp(given: Given) -> Peer:
    """Through this project's own reference, which knows llama.cpp's nodes."""
    opened = import_module("gemma2.checkpoints.checkpoint").open_checkpoint(given.folder)
    peer = import_module("gemma2.parity.references.llama_cpp").LlamaCpp(opened, given.dtype)
    wanted = [
        name for name in peer.sites if name.endswith(("hook_attn_out", "hook_mlp_out", "hook_resid_post", "ln_final"))
    ]

    def run(tokens: Tensor) -> Values:
        return {name: value[None] for name, value in peer.run(tokens[0].tolist(), [*wanted, "logits"]).items()}

    return Peer(peer.system, run, lambda tokens, chunks: peer.cached(tokens[0].tolist(), chunks)[None])


def deepmind(given: Given, compiled: str = "yes") -> Peer:
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
    return Peer(f"gemma {version('gemma')}, jax {version('jax')}, {how}{flags and f', {flags}'}", run, cached)


RECIPES: dict[str, Callable[..., Peer]] = {
    "transformers": transformers_,
    "nnsight": nnsight,
    "litgpt": litgpt,
    "torchtune": torchtune,
    "transformer_lens": transformer_lens,
    "llama.cpp": llama_cpp,
    "deepmind": deepmind,
}


def main() -> None:
    recipe, folder, out, dtype, *options = sys.argv[1:]
    torch.set_num_threads(1)
    place, config = Path(out), json.loads((Path(folder) / "config.json").read_text())
    runs = json.loads((Path(folder) / "ids.json").read_text())
    longest = max(len(run["ids"]) for run in runs.values())
    given = Given(Path(folder), config, getattr(torch, dtype), longest)
    peer = RECIPES[recipe](given, **dict(option.split("=", 1) for option in options))
    for name, asked in runs.items():
        tokens = torch.tensor([asked["ids"]])
        with torch.no_grad():
            try:
                if not asked["chunks"]:
                    found = peer.run(tokens)
                elif peer.cached:
                    found = {"logits": peer.cached(tokens, asked["chunks"])}
                else:
                    continue
            except Exception as error:  # whatever a peer may raise is what it says
                (place / f"{name}.txt").write_text(f"{type(error).__name__}: {error}")
                continue
        about = {"format": "gemma2-trace 1", "system": peer.system, "dtype": dtype, "config": json.dumps(config)}
        about["versions"] = json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]})
        tensors = {site: value[0].contiguous().clone() for site, value in found.items()}
        save_file({"ids": tokens[0], **tensors}, place / f"{name}.safetensors", metadata=about)


if __name__ == "__main__":
    main()
