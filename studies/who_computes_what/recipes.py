"""Implementations in PyTorch, and llama.cpp: each recipe builds one by its own code. Run by that implementation's own
Python."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from studies.who_computes_what.given import HUGGING_FACE, Built, Given, Values, spans, watched


def transformers_(given: Given, attention: str = "eager", gguf: str = "", chosen: str = "") -> Built:
    """With attention=default it chooses for itself, and must choose what is `chosen`."""
    transformers = import_module("transformers")
    number = tuple(map(int, transformers.__version__.split(".")[:2]))
    options: dict[str, Any] = {"dtype" if number >= (4, 56) else "torch_dtype": given.dtype}
    if attention != "default":
        options["attn_implementation"] = attention
    if gguf:
        options["gguf_file"] = gguf
    model = transformers.Gemma2ForCausalLM.from_pretrained(given.folder, **options).eval()

    def run(tokens: Tensor) -> Values:
        return watched(model, HUGGING_FACE, given.layers(), lambda: model(tokens, use_cache=False).logits)

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        hybrid = number < (4, 56)  # the cache that its generate() made for Gemma 2
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

    if attention == "default":
        attention += f", which is {model.config._attn_implementation}"
        if model.config._attn_implementation != chosen:
            raise ValueError(f"chose {model.config._attn_implementation}, where {chosen} was expected")
    how = f"GGUF, {attention}" if gguf else attention
    return Built(f"transformers {transformers.__version__} {how}", run, cached)


def nnsight(given: Given) -> Built:
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

    return Built(f"nnsight {version('nnsight')} with transformers {version('transformers')}", run, None)


def litgpt(given: Given, ends: str = "no") -> Built:
    """With `ends=yes` it is told where the cache ends, as its generate() tells it."""
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
            parts = [
                model(tokens[:, a:b], input_pos=torch.arange(a, b), input_pos_maxp1=b if ends == "yes" else None)
                for a, b in spans(chunks)
            ]
        finally:
            model.clear_kv_cache()
        return torch.cat(parts, dim=1)

    return Built(
        f"litgpt {version('litgpt')}",
        lambda tokens: watched(model, places, given.layers(), lambda: model(tokens)),
        cached,
    )


def torchtune(given: Given) -> Built:
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

    return Built(
        f"torchtune {version('torchtune')}",
        lambda tokens: watched(model, places, given.layers(), lambda: model(tokens)),
        cached,
    )


def transformer_lens(given: Given) -> Built:
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
    if hasattr(lens, "TransformerLensKeyValueCache"):
        kind = lens.TransformerLensKeyValueCache
    else:
        kind = lens.past_key_value_caching.HookedTransformerKeyValueCache

    def run(tokens: Tensor) -> Values:
        logits, seen = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(ends))
        return {**dict(seen.items()), "logits": logits}

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        cache = kind.init_cache(model.cfg, "cpu", 1)
        ones = torch.ones_like(tokens)  # without a tokenizer it does not know that nothing is padding
        parts = [model(tokens[:, a:b], past_kv_cache=cache, attention_mask=ones[:, a:b]) for a, b in spans(chunks)]
        return torch.cat(parts, dim=1)

    return Built(f"TransformerLens {version('transformer-lens')} HookedTransformer", run, cached)


def transformer_bridge(given: Given) -> Built:
    """Its TransformerBridge, over the folder; with a cache, the one that it gives back is handed in again."""
    boot = import_module("transformer_lens.model_bridge").TransformerBridge.boot_transformers
    model = boot(str(given.folder), dtype=given.dtype, device="cpu").eval()
    ends = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")

    def run(tokens: Tensor) -> Values:
        logits, seen = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(ends))
        return {**dict(seen.items()), "logits": logits}

    def cached(tokens: Tensor, chunks: list[int]) -> Tensor:
        parts, cache = [], None
        for a, b in spans(chunks):
            logits, cache = model(tokens[:, a:b], past_key_values=cache, return_type="logits_and_cache")
            parts.append(logits)
        return torch.cat(parts, dim=1)

    versions = f"{version('transformer-lens')} TransformerBridge on transformers {version('transformers')}"
    return Built(f"TransformerLens {versions}", run, cached)


def llama_cpp(given: Given) -> Built:
    """Through this project's own reference, which knows llama.cpp's nodes."""
    opened = import_module("gemma2.checkpoints.checkpoint").open_checkpoint(given.folder)
    built = import_module("gemma2.parity.references.llama_cpp").LlamaCpp(opened, given.dtype)
    wanted = [
        name for name in built.sites if name.endswith(("hook_attn_out", "hook_mlp_out", "hook_resid_post", "ln_final"))
    ]

    def run(tokens: Tensor) -> Values:
        return {name: value[None] for name, value in built.run(tokens[0].tolist(), [*wanted, "logits"]).items()}

    return Built(built.system, run, lambda tokens, chunks: built.cached(tokens[0].tolist(), chunks)[None])
