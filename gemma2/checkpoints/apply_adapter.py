"""A PEFT adapter into a model, by PEFT itself. The one file that imports PEFT."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.checkpoints.adapters import EMBEDDING, HEAD, Adapter, Plan, is_feedforward
from gemma2.checkpoints.memory import check_parameters
from gemma2.errors import BadModelFile, first_line
from gemma2.model import Gemma2, ScaledEmbedding
from gemma2.tied import check_same_device
from gemma2.tokens import check_tokens

NAME = "default"  # PEFT's own for an adapter that is given none


class OwnHead(nn.Linear):
    """A head with a weight that need not be the embedding's: PEFT wraps this, and not a tied head."""

    def __init__(self, embedding: ScaledEmbedding) -> None:
        rows, d = embedding.weight.shape
        super().__init__(d, rows, bias=False, device="meta", dtype=embedding.weight.dtype)
        self.weight = embedding.weight  # the same parameter, until something is trained apart from it

    def forward(self, x: Tensor, embedding: nn.Module | None = None) -> Tensor:
        check_same_device(x, self.weight)
        return F.linear(x, self.weight)


class KnownEmbedding(nn.Embedding):
    """`ScaledEmbedding` as PEFT knows embeddings: of PyTorch's class, with transformers' name for the scale."""

    def __init__(self, embedding: ScaledEmbedding) -> None:
        weight = embedding.weight
        super().__init__(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
        self.weight, self.scale = weight, embedding.scale
        scale = torch.tensor(self.scale, dtype=weight.dtype, device=weight.device)
        self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, len(self.weight))
        return F.embedding(tokens, self.weight) * torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu")


def check_installed() -> None:
    """Raises ImportError, with what to install, where PEFT is missing. It does not import it."""
    if find_spec("peft") is None:
        raise ImportError("an adapter is applied by PEFT, which is not installed: pip install peft")


def apply_adapter(model: Gemma2, adapter: Adapter, plan: Plan, *, merge: bool = False) -> None:
    """Put an adapter into a model, in place: PEFT's layers go around its linears, and it stays a `Gemma2`.

    Logits are to the bit those of transformers with PEFT. As there, adapter weights run in float32 where the model is
    in bfloat16 or float16, and in the model's dtype otherwise. A trained embedding or norm has the model's dtype.

    Args:
        merge: add it into the weights; the modules are then Gemma 2's own again. This rounds to the model's dtype.
            The plan must have been made for it.
    Raises:
        ImportError: PEFT is missing.
        BadModelFile: PEFT does not take it.
    """
    check_installed()
    import peft

    embedding = model.model.embed_tokens
    if plan.own_head:
        model.set_submodule(HEAD, OwnHead(embedding))
    if EMBEDDING in plan.targets or plan.tokens:
        model.set_submodule(EMBEDDING, KnownEmbedding(embedding))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights and of missing tensors: both are dealt with here
            around: Any = peft.PeftModel(model, _config(peft, adapter, plan), NAME)
            result = peft.set_peft_model_state_dict(around, dict(plan.tensors), NAME)
            around.eval()
            if HEAD in plan.targets and adapter.tied:
                _lay_out_as_tied(model.lm_head)
            if merge:
                around.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise BadModelFile(f"{adapter.where}: PEFT {peft.__version__} does not take it ({first_line(error)})") from None
    lost = [*result.unexpected_keys, *(name for name in result.missing_keys if f".{NAME}" in name)]
    if lost:
        raise BadModelFile(f"{adapter.where}: PEFT {peft.__version__} has no place for {', '.join(lost[:3])}")
    if merge:
        if isinstance(model.model.embed_tokens, KnownEmbedding):
            embedding.weight = model.model.embed_tokens.weight
            model.set_submodule(EMBEDDING, embedding)
        check_parameters(model)
    model.requires_grad_(True)  # as without an adapter: PEFT has frozen everything


def note_of(adapter: Adapter, plan: Plan, merged: bool) -> str:
    """A line that says that an adapter is in a model."""
    kind = f"{adapter.config['peft_type']}, on {len(plan.targets)} modules"
    whole = f", {len(plan.saved)} modules whole" if plan.saved else ""
    made = f", made for {adapter.base}" if adapter.base else ""
    how = "was merged into the weights" if merged else "is in the model"
    return f"the PEFT adapter {adapter.where} {how} ({kind}{whole}{made})"


def _lay_out_as_tied(head: Any) -> None:
    """PEFT's LoRA of a tied head is that of the embedding seen transposed. Another layout would round otherwise."""
    for linear in (head.lora_A[NAME], head.lora_B[NAME]):
        linear.weight.data = linear.weight.data.t().contiguous().t()


def _config(peft: Any, adapter: Adapter, plan: Plan) -> Any:
    """PEFT's config, in which every module is named in full."""
    stated = adapter.config
    common: dict[str, Any] = {"target_modules": [*plan.targets], "modules_to_save": [*plan.saved] or None}
    if stated["peft_type"] == "IA3":
        inside = [path for path in plan.targets if is_feedforward(adapter, path)]
        return peft.IA3Config(**common, feedforward_modules=inside)
    names = ("r", "lora_alpha", "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
    given = {name: stated[name] for name in names if stated.get(name)}
    init = stated.get("init_lora_weights")
    if isinstance(init, str):  # it may change the base's weights, from which the adapter was trained
        given["init_lora_weights"] = init
    if plan.tokens:
        given["trainable_token_indices"] = {EMBEDDING: plan.tokens}
    return peft.LoraConfig(**common, **given)
