"""Make tests/golden anew: a small random Gemma 2 and what other implementations compute with it.

    python scripts/make_golden.py [--pocket] [--gemma-pytorch FOLDER]
    python scripts/make_golden.py --deepmind PYTHON

Writes `model.safetensors` and `config.json` (shaped like 27B: the query scale is not the head width, the width not
heads times head width), `transformers.safetensors` (transformers, eager, float32: the residual stream after each block,
the final norm, all logits) and, when the source folder of google/gemma_pytorch is named, `gemma_pytorch.safetensors`
(the same sites, last logits), all on `ids` stored beside them. Each file's metadata says what made it.

Of the pocket model it writes traces as in docs/traces.md, by transformers, in float32 and bfloat16: `pocket_short_*`,
the stream at every block and all logits, and `pocket_long_*`, the final norm of a prompt longer than the window.

With the Python of an environment that has google-deepmind/gemma (`studies/who_computes_what` makes one), only
`deepmind_*`: traces of the small model as it is stored, by Google's own compiled JAX module. XLA is told to leave
products to Eigen, which sums them in a fixed order, that of k.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemma2 import Gemma2
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checkpoints.hf_config import read_config
from gemma2.load import POCKET
from gemma2.parity.references import open_reference
from gemma2.parity.trace import About, Trace, TraceWriter
from gemma2.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
RAW: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
LENGTH = 40  # five windows
OPENING = "In the beginning God created the heaven and the earth."
PSALM = (
    "The Lord is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me beside "
    "the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his name's sake. "
    "Yea, though I walk through the valley of the shadow of death, I will fear no evil: for thou art with me; thy "
    "rod and thy staff they comfort me. Thou preparest a table before me in the presence of mine enemies: thou "
    "anointest my head with oil; my cup runneth over. Surely goodness and mercy shall follow me all the days of "
    "my life: and I will dwell in the house of the Lord for ever."
)
STREAM = ("hook_embed", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_post", "ln_final", "logits")
DEEPMIND_TRACES = {"bfloat16": STREAM, "float32": ("logits_raw", "logits")}
EIGEN = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type="}
POCKET_TRACES = {"short": (OPENING, STREAM), "long": (PSALM, ("ln_final",))}


def make_model() -> Gemma2:
    """Random weights of bfloat16 precision, large enough that both caps saturate."""
    model, generator = Gemma2(read_config(RAW)), torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        gain = 8 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3
        std = 0.3 if "norm" in name else 1.0 if "embed" in name else gain * parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.bfloat16().float().eval()


def watch(places: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A dict that a forward pass fills with each module's output, without the batch axis."""
    seen: dict[str, Tensor] = {}
    for name, module in places.items():
        module.register_forward_hook(
            lambda m, inputs, output, name=name: seen.__setitem__(
                name, (output[0] if isinstance(output, tuple) else output)[0].clone()
            )
        )
    return seen


def run_transformers(model: Gemma2, ids: Tensor) -> tuple[dict[str, Tensor], str]:
    import transformers

    named = {key: value for key, value in RAW.items() if key not in ("model_type", "architectures")}
    config = transformers.Gemma2Config(**named, attn_implementation="eager", attention_dropout=0.0)
    external = transformers.Gemma2ForCausalLM._from_config(config, dtype=torch.float32).eval()
    state = dict(model.state_dict())
    external.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    blocks = {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(external.model.layers)}
    seen = watch({"hook_embed": external.model.embed_tokens, **blocks, "ln_final": external.model.norm})
    logits = external(ids[None], use_cache=False).logits[0]
    return {**seen, "logits": logits}, f"transformers {transformers.__version__}, eager, float32, CPU"


def run_google(model: Gemma2, ids: Tensor, source: Path) -> tuple[dict[str, Tensor], str]:
    """google/gemma_pytorch's own modules, fed as its generate() feeds them."""
    sys.path.insert(0, str(source))
    from gemma import config as google_config  # type: ignore[import-not-found]
    from gemma import model as google_model

    kind = google_config.AttentionType
    config = google_config.GemmaConfig(
        architecture=google_config.Architecture.GEMMA_2,
        vocab_size=RAW["vocab_size"],
        max_position_embeddings=RAW["max_position_embeddings"],
        num_hidden_layers=RAW["num_hidden_layers"],
        num_attention_heads=RAW["num_attention_heads"],
        num_key_value_heads=RAW["num_key_value_heads"],
        hidden_size=RAW["hidden_size"],
        intermediate_size=RAW["intermediate_size"],
        head_dim=RAW["head_dim"],
        dtype="float32",
        attn_types=[kind.LOCAL_SLIDING, kind.GLOBAL],
        sliding_window_size=RAW["sliding_window"],
        final_logit_softcapping=RAW["final_logit_softcapping"],
        attn_logit_softcapping=RAW["attn_logit_softcapping"],
        query_pre_attn_scalar=RAW["query_pre_attn_scalar"],
        use_pre_ffw_norm=True,
        use_post_ffw_norm=True,
    )
    state = dict(model.model.state_dict())
    for i in range(config.num_hidden_layers):
        stem = f"layers.{i}.self_attn."
        fused = [state.pop(f"{stem}{letter}_proj.weight") for letter in "qkv"]
        state[f"{stem}qkv_proj.weight"] = torch.cat(fused)
    embedding = state.pop("embed_tokens.weight")
    external = google_model.GemmaModel(config).eval()
    external.load_state_dict(state)

    t = len(ids)
    floor = -2.3819763e38
    mask = torch.triu(torch.full((1, 1, t, t), floor), diagonal=1)
    local = mask + torch.tril(torch.full((1, 1, t, t), floor), diagonal=-config.sliding_window_size)
    table = google_model.precompute_freqs_cis(config.head_dim, 2 * config.max_position_embeddings)[:t]
    empty = (1, t, config.num_key_value_heads, config.head_dim)
    caches = [(torch.zeros(empty), torch.zeros(empty)) for _ in range(config.num_hidden_layers)]
    blocks = {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(external.layers)}
    seen = watch({**blocks, "ln_final": external.norm})
    x = embedding[ids][None] * torch.tensor(config.hidden_size**0.5)
    hidden = external(x, {kind.LOCAL_SLIDING: table, kind.GLOBAL: table}, torch.arange(t), caches, mask, local)
    sampler = google_model.Sampler(config.vocab_size, config)
    _, last = sampler(embedding, hidden, torch.tensor([t - 1]), None, None, None)
    seen = {"hook_embed": x[0], **seen, "logits_last": last[0]}
    return seen, "google/gemma_pytorch, GemmaModel and Sampler, float32, CPU"


def write_pocket_traces() -> None:
    tokenizer = Tokenizer.from_file(POCKET / "tokenizer.model")
    for dtype in (torch.float32, torch.bfloat16):
        external = open_reference("transformers", POCKET, dtype)
        named = dtype_name(dtype)
        about = About(
            external.system, named, external.config, {**external.versions, "threads": str(torch.get_num_threads())}
        )
        for name, (text, sites) in POCKET_TRACES.items():
            ids, path = tokenizer.encode(text), GOLDEN / f"pocket_{name}_{named}.safetensors"
            with TraceWriter(path, about, ids, sites, dtype, force=True) as trace:
                for site, value in external.run(ids, trace.sites).items():
                    trace.add(site, value)
            size = path.stat().st_size
            print(f"{path.name}: {about.system}, {len(trace.sites)} sites of {len(ids)} token ids, {size:,} bytes")


def write_deepmind_traces(python: Path) -> None:
    ids = load_file(GOLDEN / "transformers.safetensors")["ids"].tolist()
    for dtype, sites in DEEPMIND_TRACES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for name in ("config.json", "model.safetensors"):
                (folder / name).write_bytes((GOLDEN / name).read_bytes())
            (folder / "ids.json").write_text(json.dumps({"all": {"ids": ids, "chunks": []}}), encoding="utf-8")
            module = "studies.who_computes_what.run_one"
            command: list[str | Path] = [python.absolute(), "-m", module, "deepmind", folder, folder, dtype]
            subprocess.run(command, cwd=ROOT, env={**os.environ, **EIGEN}, check=True)
            seen, path = Trace(folder / "all.safetensors"), GOLDEN / f"deepmind_{dtype}.safetensors"
            with TraceWriter(path, seen.about, ids, sites, getattr(torch, dtype), force=True) as trace:
                for site in trace.sites:
                    trace.add(site, seen[site])
        print(f"{path.name}: {seen.about.system}, {len(trace.sites)} sites, {path.stat().st_size:,} bytes")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma-pytorch", type=Path, metavar="FOLDER", help="a checkout of google/gemma_pytorch")
    parser.add_argument("--pocket", action="store_true", help="only the traces of the pocket model")
    parser.add_argument("--deepmind", type=Path, metavar="PYTHON", help="only the traces of google-deepmind/gemma")
    args = parser.parse_args()
    if args.deepmind:
        return write_deepmind_traces(args.deepmind)
    GOLDEN.mkdir(exist_ok=True)
    write_pocket_traces()
    if args.pocket:
        return
    model = make_model()
    ids = torch.randint(RAW["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(3))
    (GOLDEN / "config.json").write_text(json.dumps(RAW, indent=2) + "\n", encoding="utf-8")
    made = {"made_by": "scripts/make_golden.py, seed 2", "format": "pt"}
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, GOLDEN / "model.safetensors", metadata=made)
    runs = {"transformers": run_transformers(model, ids)}
    if args.gemma_pytorch:
        runs["gemma_pytorch"] = run_google(model, ids, args.gemma_pytorch)
    for name, (seen, external) in runs.items():
        trace = {site: tensor.contiguous() for site, tensor in seen.items()} | {"ids": ids}
        save_file(
            trace, GOLDEN / f"{name}.safetensors", metadata={**made, "external": external, "torch": torch.__version__}
        )
        print(f"{name}: {external}, {len(trace)} tensors")
    size = sum(path.stat().st_size for path in GOLDEN.iterdir())
    print(f"{GOLDEN}: {size:,} bytes")


if __name__ == "__main__":
    main()
