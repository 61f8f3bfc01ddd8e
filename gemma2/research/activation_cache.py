"""The cache of `research.hooked`: values of one pass under TransformerLens's names, with its stacks and its sums.

The names, arguments and numbers are those of TransformerLens 3.9's `ActivationCache`, for a model that was made with
`fold_ln=True`, its default: the gain of the final norm is part of `W_U`, and a norm that is applied here divides by its
scale and does nothing else. Then every decomposition adds up to the logit before the cap. Its other options of
processing (`center_writing_weights`, `center_unembed`, `fold_value_biases`) change nothing in a Gemma 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gemma2 import ops
from gemma2.model import Gemma2
from gemma2.research.lens_words import (
    GRAD,
    INVERSE,
    RESULT,
    SCALE,
    PosSlice,
    Z,
    check_one_row,
    named,
    of_scale,
    residual_directions,
    shown,
    sliced,
)
from gemma2.research.sites import chosen


class ActivationCache(Mapping[str, Tensor]):
    """Values by name: `cache["blocks.3.hook_resid_post"]`, `cache["resid_post", 3]`, `cache["scale", 3, "ln1"]`.

    Names are those of `gemma2.research.sites`, with TransformerLens's `hook_scale` in the place of `hook_inv_scale`;
    every alias is taken too, `hook_inv_scale` among them, and -1 is the last layer. `hook_result` is computed when it
    is asked for. With gradients, `cache["blocks.3.hook_resid_post_grad"]` is one.

    Attributes:
        model: whose values they are.
        has_batch_dim: whether they have the batch axis.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        model: Gemma2,
        to_single_token: Callable[[str], int],
        has_batch_dim: bool = True,
    ) -> None:
        self.values_by_site, self.model, self.has_batch_dim = dict(values), model, has_batch_dim
        self._to_single_token = to_single_token

    def __getitem__(self, key: Any) -> Tensor:
        name = self._site(key)
        if name.endswith(SCALE):
            return 1 / self._value(name.replace(SCALE, INVERSE))
        if name.endswith(SCALE + GRAD):
            inverse = name.replace(SCALE, INVERSE)
            return of_scale(self._value(inverse), self._value(inverse.removesuffix(GRAD)))
        if name.endswith(RESULT):
            return self._head_results(int(name.split(".")[1]))
        return self._value(name)

    def __iter__(self) -> Iterator[str]:
        return (shown(name) for name in self.values_by_site)

    def __len__(self) -> int:
        return len(self.values_by_site)

    def __contains__(self, key: object) -> bool:
        return self._site(key).replace(SCALE, INVERSE).replace(RESULT, Z) in self.values_by_site

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self)}"

    def to(self, device: torch.device | str) -> ActivationCache:
        """Move the values to a device, in place."""
        self.values_by_site = {name: value.to(device) for name, value in self.values_by_site.items()}
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Take the batch axis away, in place. Raises ValueError for more than one row."""
        if self.has_batch_dim:
            check_one_row({len(value) for value in self.values_by_site.values()})
            self.values_by_site = {name: value[0] for name, value in self.values_by_site.items()}
            self.has_batch_dim = False
        return self

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream before each layer up to `layer`, stacked: [n ... d]; of all layers, also the last one's.

        Args:
            layer: default, -1 and the number of layers: all of them.
            incl_mid: the stream between attention and MLP too.
            apply_ln: apply the final norm to each, with the scale of its own if all layers are stacked ("logit lens");
                else the norm that `layer` reads through, with the scale of the pass.
            pos_slice: of the tokens: a number, a list, a slice or its arguments.
            mlp_input: also the stream that the MLP of `layer` reads.
            return_labels: return (stack, names).
        """
        n = self.model.config.num_hidden_layers
        layer = self._up_to(layer)
        parts, labels = [], []
        for i in range(layer + 1):
            if i == n:
                parts.append(self["resid_post", n - 1])
                labels.append("final_post")
                continue
            parts.append(self["resid_pre", i])
            labels.append(f"{i}_pre")
            if (incl_mid and i < layer) or (mlp_input and i == layer):
                parts.append(self["resid_mid", i])
                labels.append(f"{i}_mid")
        stack = self._stack(parts, pos_slice)
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input=mlp_input, pos_slice=pos_slice, recompute_ln=layer == n
            )
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: PosSlice = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What the embedding, each attention and each MLP before `layer` added to the stream, stacked: [n ... d].

        They sum to the stream that `layer` reads. Arguments are as in `accumulated_resid`.

        Args:
            mode: "all", "attn" or "mlp".
        """
        if mode not in ("all", "attn", "mlp"):
            raise ValueError(f'mode is "all", "attn" or "mlp", not {mode!r}')
        layer = self._up_to(layer)
        if mlp_input and layer == self.model.config.num_hidden_layers:
            raise ValueError("mlp_input needs a layer, for there is no MLP after the last")
        parts, labels = ([self["hook_embed"]], ["embed"]) if incl_embeds else ([], [])
        for i in range(layer + 1):
            if mode != "mlp" and (i < layer or mlp_input):
                parts.append(self["attn_out", i])
                labels.append(f"{i}_attn_out")
            if mode != "attn" and i < layer:
                parts.append(self["mlp_out", i])
                labels.append(f"{i}_mlp_out")
        stack = self._stack(parts, pos_slice)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input=mlp_input, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: PosSlice = None,
        apply_ln: bool = False,
        post_norm: bool = False,
    ) -> Any:
        """Each head's output in the layers before `layer`, stacked: [layers*heads ... d].

        Args:
            incl_remainder: then the rest of the stream, as the last one.
            post_norm: False gives TransformerLens's values, z @ W_O. In Gemma 2 they are not what is added to the
                stream: attention's output goes through a norm first. True sends each head through that norm, with the
                scale of the pass: the heads of a layer then sum to its `hook_attn_out`.
        """
        layer = self._up_to(layer)
        if not layer:
            raise ValueError("there are no heads before layer 0")
        results = [self._head_results(i, post_norm) for i in range(layer)]
        parts = [sliced(result, pos_slice, -3) for result in results]
        stack = torch.cat(parts, dim=-2).movedim(-2, 0)
        labels = [f"L{i}H{head}" for i in range(layer) for head in range(self.model.config.num_attention_heads)]
        if incl_remainder:
            whole = sliced(self["resid_post", layer - 1], pos_slice, -2)
            stack = torch.cat((stack, (whole - stack.sum(dim=0))[None]))
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_activation(self, activation_name: str, layer: int = -1, sublayer_type: str | None = None) -> Tensor:
        """The values of a short name in all layers before `layer`, stacked: [layers ...]."""
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(self._up_to(layer))])

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: PosSlice = None,
        batch_slice: PosSlice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Divide parts of the stream [n ... d] by the scale that the norm before `layer` had in the pass.

        The gain is not applied: it is part of what reads, as in a model with `fold_ln=True`.

        Args:
            layer: default, -1 and the number of layers: the final norm.
            pos_slice: which tokens the stack has already been cut to.
            batch_slice: of the rows, to cut the stack and the scale to.
            recompute_ln: divide each part by the rms of its own; the final norm only.
        """
        layer, n = self._up_to(layer), self.model.config.num_hidden_layers
        if has_batch_dim:
            residual_stack = sliced(residual_stack, batch_slice, 1)
        if recompute_ln and layer == n:
            wide = ops.upcast(residual_stack)
            return (wide * ops.inverse_rms(wide, self.model.model.norm.eps)).to(residual_stack.dtype)
        norm = "ln_final" if layer == n else f"blocks.{layer}.ln{2 if mlp_input else 1}"
        inverse = sliced(self[f"{norm}.{INVERSE}"], pos_slice, -2)
        if self.has_batch_dim:
            inverse = sliced(inverse, batch_slice, 0)
        return (ops.upcast(residual_stack) * inverse).to(residual_stack.dtype)

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: str | int | Tensor,
        incorrect_tokens: str | int | Tensor | None = None,
        pos_slice: PosSlice = None,
        batch_slice: PosSlice = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """What each part of the stream [n ... d] adds to the logits of `tokens`, before the cap: [n ...].

        Args:
            tokens: one, or one for each row [b] or each token [b t].
            incorrect_tokens: take the difference to the logits of these.
        """
        directions = residual_directions(self.model, tokens, self._to_single_token)
        if incorrect_tokens is not None:
            wrong = residual_directions(self.model, incorrect_tokens, self._to_single_token)
            if wrong.shape != directions.shape:
                raise ValueError(f"tokens and incorrect_tokens are {list(directions.shape)} and {list(wrong.shape)}")
            directions = directions - wrong
        scaled = self.apply_ln_to_stack(
            residual_stack, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim
        )
        return (scaled * directions.to(scaled)).sum(dim=-1)

    def _site(self, key: Any) -> str:
        return named(key, self.model.config.num_hidden_layers)

    def _value(self, name: str) -> Tensor:
        if name in self.values_by_site:
            return self.values_by_site[name]
        try:
            chosen(self.model.config, name.replace(SCALE, INVERSE).replace(RESULT, Z).removesuffix(GRAD))
        except ValueError as error:
            raise KeyError(str(error)) from None
        kept = ", ".join(list(self)[:4])
        raise KeyError(
            f"{name} is not in this cache, which holds {kept} ...: run again with a names_filter that has it"
        )

    def _up_to(self, layer: int | None) -> int:
        n = self.model.config.num_hidden_layers
        if layer is None or layer == -1:
            return n
        if not 0 <= layer <= n:
            raise ValueError(f"layer must be from 0 to {n}, or -1, not {layer}")
        return layer

    def _stack(self, parts: list[Tensor], pos_slice: PosSlice) -> Tensor:
        return torch.stack([sliced(part, pos_slice, -2) for part in parts])

    def _head_results(self, layer: int, post_norm: bool = False) -> Tensor:
        """[... t h d]"""
        block: Any = self.model.model.layers[layer]
        z = self["z", layer]
        weight = block.self_attn.o_proj.weight.to(z.dtype).unflatten(-1, z.shape[-2:])  # [d h c]
        result = torch.einsum("...hc,dhc->...hd", z, weight.to(z.device))
        if not post_norm:
            return result
        norm = block.post_attention_layernorm
        gain = 1.0 + ops.upcast(norm.weight)
        return (ops.upcast(result) * self["inv_scale", layer, "ln1_post"][..., None, :] * gain).to(result.dtype)
