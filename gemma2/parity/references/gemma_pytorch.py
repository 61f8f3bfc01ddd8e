"""google/gemma_pytorch, from a folder with its source: https://github.com/google/gemma_pytorch, no package of it is
published. Its code is imported and run. Written against revision 014acb7 (2025-03-12)."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.google import fused
from gemma2.checkpoints.weights import build
from gemma2.config import LOCAL
from gemma2.errors import BadModelFile
from gemma2.numerics.changes import Storage
from gemma2.parity.references import CannotDo, parse_row, parse_sites, spans
from gemma2.parity.references.hooks import COMMON, INPUT, OUTPUT, as_site, in_layers, watching

THETA = 10000.0  # written into its code
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # that its config takes
MASKED = -2.3819763e38  # what its generate() fills masks with
QKV = "model.layers.{i}.self_attn.qkv_proj"
PLACES = {
    "hook_embed": ("model", INPUT),
    "blocks.{i}.attn.hook_q": (QKV, OUTPUT),
    "blocks.{i}.attn.hook_k": (QKV, OUTPUT),
    "blocks.{i}.attn.hook_v": (QKV, OUTPUT),
    **COMMON,
}
Caches = list[tuple[Tensor, Tensor]]


class GemmaPyTorch:
    """A `Reference` over gemma_pytorch's `GemmaForCausalLM` on the CPU, fed as its `generate` feeds it.

    Logits are asked of it for all positions at once, where `generate` asks for those of the last; in a matrix product
    that can be another order of summation.

    Raises:
        BadModelFile: the folder has no gemma/model.py, or its code is not of the revision that this was written for.
        ImportError: a package that its code imports is not installed.
        CannotDo: its code has no place for a number of the config, or for the dtype.
    """

    storage: Storage | None = None

    def __init__(self, folder: Path, opened: Checkpoint, dtype: torch.dtype) -> None:
        if dtype not in NAMES:
            raise CannotDo(f"gemma_pytorch computes in {', '.join(NAMES.values())}, not in {dtype}")
        if opened.config.rope_theta != THETA:
            raise CannotDo(f"gemma_pytorch has rope_theta {THETA:g} in its code, not {opened.config.rope_theta:g}")
        if opened.config.hidden_size % opened.config.num_attention_heads:
            raise CannotDo("gemma_pytorch takes no hidden_size that its heads do not divide")
        self.model = _loaded(folder, opened, dtype)
        self.dtype, self.config = dtype, opened.config
        self.longest: int | None = opened.config.max_position_embeddings
        revision = _revision(folder)
        self.system = f"gemma_pytorch {revision}"
        self.versions: Mapping[str, str] = {"gemma_pytorch": revision, "torch": torch.__version__}
        layers = self.config.num_hidden_layers
        self._places = in_layers(PLACES, layers)
        self._keys = {f"blocks.{layer}.attn.hook_rot_k": layer for layer in range(layers)}  # read from the cache
        self.sites = frozenset((*self._places, *self._keys, "logits"))

    @torch.no_grad()
    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        tokens, wanted = parse_row(self, ids), parse_sites(self, sites)
        seen: dict[str, Tensor] = {}

        def see(name: str, value: Tensor) -> None:
            if name.endswith(("hook_q", "hook_k", "hook_v")):
                value = self._part(value, name[-1])
            seen[name] = as_site(name, value, self.config)

        caches = self._caches(1, len(ids))
        with watching(self.model, {name: self._places[name] for name in wanted if name in self._places}, see):
            see("logits", self._logits(tokens, 0, caches))
        for name, layer in self._keys.items():
            see(name, caches[layer][0])
        return {name: seen[name] for name in wanted}

    def with_window(self, window: int) -> GemmaPyTorch:
        other = copy(self)  # its modules ask only whether there is a window; the masks, which have it, are made here
        other.config = replace(self.config, sliding_window=window)
        return other

    @torch.no_grad()
    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        tokens, caches = parse_row(self, ids), self._caches(1, len(ids))
        return torch.cat([self._logits(tokens[:, a:b], a, caches) for a, b in spans(ids, chunks)], dim=1)[0]

    @torch.no_grad()
    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Without padding: first as many token ids of every row as the shortest row has, then one of each row at a
        time. A row that has ended is fed zeros, and what they give is dropped."""
        for row in rows:
            parse_row(self, row)
        shortest, longest = min(map(len, rows)), max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        caches = self._caches(len(rows), longest)
        parts = [(0, shortest), *((at, at + 1) for at in range(shortest, longest))]
        logits = torch.cat([self._logits(tokens[:, a:b], a, caches) for a, b in parts], dim=1)
        return [found[: len(row)] for found, row in zip(logits, rows, strict=True)]

    def _logits(self, tokens: Tensor, start: int, caches: Caches) -> Tensor:
        """Of tokens [b t] from a position on: [b t v]."""
        size, (batch, t) = caches[0][0].shape[1], tokens.shape
        positions = torch.arange(start, start + t)
        hidden = torch.full((1, 1, size, size), MASKED, dtype=torch.float32)
        mask = hidden.triu(1)
        local = mask + hidden.tril(-self.config.sliding_window)
        _, logits = self.model(
            input_token_ids=tokens,
            input_positions=positions,
            kv_write_indices=None,
            kv_caches=caches,
            mask=mask[:, :, positions],
            output_positions=torch.arange(t),
            temperatures=None,
            top_ps=None,
            top_ks=None,
            local_mask=local[:, :, positions],
        )
        return logits.reshape(batch, t, -1)

    def _caches(self, batch: int, size: int) -> Caches:
        shape = (batch, size, self.config.num_key_value_heads, self.config.head_dim)
        pairs = [torch.zeros(2, *shape, dtype=self.dtype) for _ in range(self.config.num_hidden_layers)]
        return [(keys, values) for keys, values in pairs]

    def _part(self, qkv: Tensor, letter: str) -> Tensor:
        c, h, g = self.config.head_dim, self.config.num_attention_heads, self.config.num_key_value_heads
        return qkv.split([h * c, g * c, g * c], dim=-1)["qkv".index(letter)]


def _loaded(folder: Path, opened: Checkpoint, dtype: torch.dtype) -> Any:
    try:
        config_module, model_module = _imported(folder)
        with tempfile.TemporaryDirectory() as temporary, _default(dtype):
            tokenizer = Path(temporary) / "tokenizer.model"  # it opens the file, and is never asked to use it
            tokenizer.write_bytes(opened.tokenizer.to_proto())
            model = model_module.GemmaForCausalLM(_config(config_module, opened, dtype, tokenizer))
    except (AttributeError, TypeError) as error:
        raise BadModelFile(f"{folder}: its code is not that of revision 014acb7, which is needed ({error})") from None
    built = build(opened.weights, opened.config, torch.device("cpu"), dtype, progress=False)
    ours = {name: parameter.detach() for name, parameter in built.named_parameters()}
    theirs = {name: torch.cat([ours[part] for part in parts]) for name, parts in fused(ours).items()}
    model.load_state_dict({**theirs, "freqs_cis": model.freqs_cis}, strict=True)
    return model.eval()


def _config(theirs: Any, opened: Checkpoint, dtype: torch.dtype, tokenizer: Path) -> Any:
    ours, kinds = opened.config, theirs.AttentionType
    return theirs.GemmaConfig(
        architecture=theirs.Architecture.GEMMA_2,
        dtype=NAMES[dtype],
        tokenizer=str(tokenizer),
        use_pre_ffw_norm=True,
        use_post_ffw_norm=True,
        vocab_size=ours.vocab_size,
        max_position_embeddings=ours.max_position_embeddings,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.rms_norm_eps,
        attn_types=[kinds.LOCAL_SLIDING if kind == LOCAL else kinds.GLOBAL for kind in ours.layer_types],
        sliding_window_size=ours.sliding_window,
        final_logit_softcapping=ours.final_logit_softcapping,
        attn_logit_softcapping=ours.attn_logit_softcapping,
        query_pre_attn_scalar=ours.query_pre_attn_scalar,
    )


def _imported(folder: Path) -> tuple[Any, Any]:
    """Its config and model. Another package called `gemma` may be imported too: neither sees the other."""
    if not (folder / "gemma" / "model.py").is_file():
        raise BadModelFile(f"{folder}: no gemma/model.py in it; give the folder of a checkout of google/gemma_pytorch")
    others = {name: sys.modules.pop(name) for name in _named_gemma()}
    sys.path.insert(0, str(folder.resolve()))
    try:
        importlib.invalidate_caches()
        return importlib.import_module("gemma.config"), importlib.import_module("gemma.model")
    except ImportError as error:
        raise ImportError(
            f"{folder}: gemma_pytorch cannot be imported ({error}): install what its requirements.txt lists"
        ) from None
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in _named_gemma():
            del sys.modules[name]
        sys.modules.update(others)


def _named_gemma() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "gemma"]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of this dtype, as its scripts/run.py makes them; its rotary table is float32 all the same."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _revision(folder: Path) -> str:
    if not (folder / ".git").exists():
        return "of unknown revision"
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of unknown revision"
