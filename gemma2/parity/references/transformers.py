"""Hugging Face transformers, eager attention, seen by hooks on its modules."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.checkpoints.hf_config import config_dict, read_config
from gemma2.checkpoints.weights import build
from gemma2.errors import BadModelFile
from gemma2.numerics.changes import Storage
from gemma2.parity.references import parse_row, parse_sites, spans
from gemma2.parity.references.gradients import gradients_of
from gemma2.parity.references.hooks import COMMON, OUTPUT, as_site, in_layers, watching
from gemma2.tied import EMBEDDING, HEAD
from gemma2.tokens import left_padded

try:
    import transformers
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.models.gemma2.modeling_gemma2 import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
except ImportError as error:
    raise ImportError(f"transformers is not installed: pip install transformers ({error})") from None

VERSION = str(transformers.__version__)
ATTENTION = "gemma2_observed_eager"  # in transformers' own registry of attention functions
ATTEND = "model.layers.{i}.self_attn"
PLACES = {
    "hook_embed": ("model.embed_tokens", OUTPUT),
    "blocks.{i}.attn.hook_q": (f"{ATTEND}.q_proj", OUTPUT),
    "blocks.{i}.attn.hook_k": (f"{ATTEND}.k_proj", OUTPUT),
    "blocks.{i}.attn.hook_v": (f"{ATTEND}.v_proj", OUTPUT),
    "blocks.{i}.attn.hook_rot_q": (f"{ATTEND}.observed_query", OUTPUT),
    "blocks.{i}.attn.hook_rot_k": (f"{ATTEND}.observed_key", OUTPUT),
    "blocks.{i}.attn.hook_pattern": (f"{ATTEND}.observed_pattern", OUTPUT),
    "logits_raw": ("lm_head", OUTPUT),
    **COMMON,
}


def observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, and what it reads and weighs shown to the modules that stand there for hooks."""
    output, pattern = eager_attention_forward(module, query, key, value, mask, **options)
    module.get_submodule("observed_query")(query.transpose(1, 2))
    module.get_submodule("observed_key")(key.transpose(1, 2))
    module.get_submodule("observed_pattern")(pattern)
    return output, pattern


class Transformers:
    """A `Reference` over `transformers.Gemma2ForCausalLM` on the CPU.

    It reads a Hugging Face folder itself. Of a GGUF it reads the tensors itself and is given the config, since it reads
    neither caps nor a query scale from one. Of other forms, and of a split GGUF, it is given the tensors too.

    Raises:
        ImportError: what it needs to read a GGUF is not installed.
        BadModelFile: it does not take every tensor, or finds some missing.
    """

    storage: Storage | None = None

    def __init__(self, opened: Checkpoint, dtype: torch.dtype) -> None:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, observed_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        self._model = loaded(opened, dtype)
        for layer in self._model.model.layers:
            for name in ("query", "key", "pattern"):
                layer.self_attn.add_module(f"observed_{name}", nn.Identity())
        self.system = f"transformers {transformers.__version__} eager"
        self.dtype = dtype
        self.config = read_config(self._model.config.to_dict(), self.system)
        self.versions: Mapping[str, str] = {"transformers": transformers.__version__, "torch": torch.__version__}
        self._places = in_layers(PLACES, self.config.num_hidden_layers)
        self.sites = frozenset((*self._places, "logits"))
        self.longest: int | None = self.config.max_position_embeddings

    @torch.no_grad()
    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        tokens, wanted = parse_row(self, ids), parse_sites(self, sites)
        seen: dict[str, Tensor] = {}

        def see(name: str, value: Tensor) -> None:
            seen[name] = as_site(name, value, self.config)

        with watching(self._model, {name: self._places[name] for name in wanted if name in self._places}, see):
            see("logits", self._model(tokens, use_cache=False).logits)
        return {name: seen[name] for name in wanted}

    def with_window(self, window: int) -> Transformers:
        other = copy(self)
        other.config = replace(self.config, sliding_window=window)
        # Everything anew but the parameters.
        other._model = deepcopy(self._model, {id(parameter): parameter for parameter in self._model.parameters()})
        other._model.config.sliding_window = window
        for layer in other._model.model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = window
        return other

    @torch.no_grad()
    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        tokens, cache = parse_row(self, ids), transformers.DynamicCache(config=self._model.config)
        parts = [
            self._model(tokens[:, start:stop], past_key_values=cache, use_cache=True).logits
            for start, stop in spans(ids, chunks)
        ]
        return torch.cat(parts, dim=1)[0]

    @torch.no_grad()
    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        for row in rows:
            parse_row(self, row)
        tokens, positions = left_padded(rows)
        logits = self._model(
            tokens,
            attention_mask=(positions >= 0).long(),
            position_ids=positions.clamp_min(0),
            use_cache=False,
        ).logits
        return [found[-len(row) :] for found, row in zip(logits, rows, strict=True)]

    def gradients(self, ids: Sequence[int]) -> dict[str, Tensor | None]:
        """Of the mean next-token loss, by each weight, see `gemma2.parity.gradients`."""
        return gradients_of(self._model, parse_row(self, ids), lambda output: output.logits, use_cache=False)


def loaded(opened: Checkpoint, dtype: torch.dtype, attention: str = ATTENTION) -> Any:
    """`transformers.Gemma2ForCausalLM` with a checkpoint's weights. For the errors see `Transformers`."""
    # Built in `dtype` rather than moved to it afterwards, which would round its rotary table too.
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "output_loading_info": True}
    path, source = opened.path, None
    if opened.form in ("safetensors", "bin") and path.is_dir() and not _has_other_names(opened):
        source = path
    else:
        stated = config_dict(opened.config)
        options["config"] = transformers.Gemma2Config(
            **{name: value for name, value in stated.items() if name not in ("model_type", "architectures")}
        )
        if _is_one_gguf(opened):
            source, options["gguf_file"] = path.parent, path.name
        else:
            ours = build(opened.weights, opened.config, torch.device("cpu"), dtype, progress=False)
            tensors = {name: tensor.detach() for name, tensor in ours.named_parameters()}
            options["state_dict"] = {**tensors, HEAD: tensors[EMBEDDING]}
    try:
        with _quiet():
            model, found = transformers.Gemma2ForCausalLM.from_pretrained(source, **options)
    except ImportError as error:
        said = " ".join(str(error).split())[:200]
        raise ImportError(f"{path}: transformers lacks what it needs to read it: {said}") from None
    odd = [f"{kind} {min(map(str, names))}" for kind, names in found.items() if names]
    if odd:
        raise BadModelFile(f"{path}: transformers reads it otherwise: {', '.join(odd)}")
    return model.eval()


def _has_other_names(opened: Checkpoint) -> bool:
    """Whether the file's names are not those that transformers reads."""
    return any(opened.weights.in_file(name) != name for name in opened.weights.tensors)


def _is_one_gguf(opened: Checkpoint) -> bool:
    """Of a split one transformers would read the first part."""
    weights = opened.weights
    return isinstance(weights, GGUFWeights) and weights.files == {opened.path}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and advice, which are settings of the process; the bar over a GGUF's tensors heeds none of them."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
