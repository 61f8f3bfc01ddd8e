"""`Gemma2` as transformers' classes. `as_transformers` makes them; nothing else imports this file.

The modules are those of the wrapped model, and transformers' own caches hold the keys. So everything that transformers
does around a model (beams, sampling, assisted decoding, saving, training) is its own code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from gemma2.cache import EMPTY, Held
from gemma2.checkpoints.hf_config import config_dict
from gemma2.model import Gemma2
from gemma2.research.arguments import check_mask, check_options, check_unpacked, whole_rows
from gemma2.research.watch import check_shown
from gemma2.tied import drop_equal_head

LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")  # what transformers' loss takes beside logits and labels
# Caches of later versions count by themselves; those of 5.0 are told which columns are new.
BY_LENGTH = "query_length" in inspect.signature(Cache.get_mask_sizes).parameters


class Columns:
    """A layer's place in a cache of transformers, or no cache. Keys are seen by their column, not by their position:
    that is transformers' rule, and where padding is only on the left it is the same one."""

    def __init__(self, cache: Cache | None, layer: int, mask: Tensor | None) -> None:
        self.cache, self.layer, self.mask = cache, layer, mask

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> Held:
        """Store keys and values [b t g c]; return those held, and their columns [b s], -1 for padding. Slots that are
        still empty have columns that are yet to come, which no query sees."""
        first: int | Tensor = 0
        if self.cache is not None:
            asked, said = (keys.shape[1], ()) if BY_LENGTH else (positions[0], ({"cache_position": positions[0]},))
            _, first = self.cache.get_mask_sizes(asked, self.layer)
            keys, values = self.cache.update(keys.transpose(1, 2), values.transpose(1, 2), self.layer, *said)
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        columns = (torch.arange(keys.shape[1], device=keys.device) + first).expand(keys.shape[:2])
        if self.mask is not None:
            mask = self.mask.to(keys.device)
            known = mask.gather(1, columns.clamp(max=mask.shape[1] - 1))
            columns = columns.masked_fill(known == 0, EMPTY)
        return keys, values, columns


class Around(transformers.PreTrainedModel):  # type: ignore[misc]
    """What both classes below say to transformers' tools: the weights are there, and the vocabulary keeps its size."""

    config_class = transformers.Gemma2Config
    base_model_prefix, main_input_name = "model", "input_ids"
    whole: Gemma2
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: transformers.Gemma2Config, whole: Gemma2) -> None:
        super().__init__(config)
        object.__setattr__(self, "whole", whole)  # not a submodule: every parameter keeps its one name

    def wanted(self, name: str, given: bool | None) -> bool:
        return bool(getattr(self.config, name) if given is None else given)

    def init_weights(self) -> None:
        """Nothing: the weights are there."""

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Nothing: the head reads the embedding's own weight."""

    def get_input_embeddings(self) -> nn.Module:
        return self.whole.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> NoReturn:
        raise ValueError("the embedding is also the head and is not replaced here: see gemma2.twins.replaced")

    set_output_embeddings = set_input_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Module:
        """The embedding, if it has that many rows. Raises ValueError for another number."""
        pad = args[0] if args else options.get("pad_to_multiple_of")
        rows = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        rows = rows if pad is None else -(-rows // pad) * pad
        if rows != self.config.vocab_size:
            raise ValueError(
                f"the embedding keeps its {self.config.vocab_size} rows, {rows} are asked for: resize transformers' "
                "own model, save it, and load the folder with gemma2.load"
            )
        return self.get_input_embeddings()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, every_n_layers: int = 1
    ) -> None:
        self.base_model.gradient_checkpointing = enable
        self.base_model.checkpoint, self.base_model.checkpoint_every = gradient_checkpointing_func, every_n_layers

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> NoReturn:
        raise ValueError("load with gemma2.load(name), then call gemma2.as_transformers on what it returns")


class Gemma2Model(Around):
    """Everything below the head, with the arguments of transformers' `Gemma2Model`."""

    gradient_checkpointing, checkpoint, checkpoint_every = False, staticmethod(checkpoint), 1

    def __init__(self, config: transformers.Gemma2Config, whole: Gemma2) -> None:
        super().__init__(config, whole)
        self.__dict__["_modules"] = whole.model._modules  # this very dict: what replaces a module here does so there
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """As transformers' `Gemma2Model.forward`. `inputs_embeds` are outputs of the embedding: already scaled.

        Raises:
            ValueError: an argument that cannot be honoured, or that does not fit the others.
        """
        check_options(options)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        batch, t = x.shape[:2]
        start = 0 if cache is None else cache.get_seq_length()
        columns = (torch.arange(t, device=x.device) + start).expand(batch, t)
        check_mask(attention_mask, batch, start, t)
        positions = columns if position_ids is None else whole_rows(position_ids, batch, t)
        if position_ids is not None and attention_mask is None and cache is None:
            check_unpacked(positions)
        rotary = self.rotary_emb(positions, x.dtype)
        streams: list[Tensor] | None = [] if self.wanted("output_hidden_states", output_hidden_states) else None
        with ExitStack() as hooks:
            patterns = self._patterns(hooks) if self.wanted("output_attentions", output_attentions) else None
            for i, layer in enumerate(self.layers):
                if streams is not None:
                    streams.append(x)
                place = Columns(cache, i, attention_mask)
                if self.recomputes and i % self.checkpoint_every == 0:
                    x = self.checkpoint(layer, x, columns, rotary, place)
                else:
                    x = layer(x, columns, rotary, place)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=None if streams is None else (*streams, x),
            attentions=None if patterns is None else tuple(patterns),
        )
        return output if self.wanted("return_dict", return_dict) else output.to_tuple()

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again in the backward pass; they would store their keys again, so no cache."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _cache(self, given: Any, wanted: bool | None) -> Cache | None:
        """The cache to use: the one given, or a new one of transformers where one is wanted."""
        if given is not None and not isinstance(given, Cache):
            raise ValueError(
                f"past_key_values is of type {type(given).__name__}: give a cache of transformers, as "
                "DynamicCache(config=model.config); gemma2's own caches are for gemma.model"
            )
        if self.recomputes and given is not None:
            raise ValueError(
                "gradient checkpointing computes layers twice and takes no cache: leave past_key_values out"
            )
        if given is not None or self.recomputes or not self.wanted("use_cache", wanted):
            return given
        return DynamicCache(config=self.config)

    def _patterns(self, hooks: ExitStack) -> list[Tensor]:
        """A list that fills with each layer's attention weights [b h t s], keys in the order of columns."""
        check_shown(self.whole, [f"blocks.{i}.attn.hook_pattern" for i in range(len(self.layers))])
        found: list[Tensor] = []

        def see(module: nn.Module, inputs: object, pattern: Tensor) -> None:
            found.append(pattern)

        for i in range(len(self.layers)):
            tap = self.get_submodule(f"layers.{i}.self_attn.attend.hook_pattern")
            hooks.callback(tap.register_forward_hook(see).remove)
        return found


class Head(nn.Module):
    """The head as transformers' tools ask for it: x [b t d] -> logits before the cap. Its weight is the embedding's."""

    whole: Gemma2
    bias = None

    def __init__(self, whole: Gemma2) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)

    @property
    def weight(self) -> Tensor:
        return self.whole.model.embed_tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.lm_head(x, self.whole.model.embed_tokens)


class Gemma2ForCausalLM(Around, transformers.GenerationMixin):  # type: ignore[misc]
    """The modules of a `Gemma2` under the name, config and arguments of transformers' class."""

    accepts_loss_kwargs = True  # Trainer gives the number of tokens in the whole batch, and the loss divides by it
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  # the head has no weight of its own

    def __init__(self, whole: Gemma2, ids: dict[str, Any], settings: dict[str, Any]) -> None:
        """`ids` of special tokens are for the config; `settings` are those of a generation_config.json."""
        super().__init__(foreign_config(whole, ids), whole)
        self.model, self.lm_head = Gemma2Model(self.config, whole), Head(whole)
        self.generation_config = transformers.GenerationConfig.from_dict(settings)
        self.post_init()
        self.train(whole.training)
        self.register_load_state_dict_pre_hook(drop_equal_head)  # transformers' state_dict() has `lm_head.weight` too

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """As transformers' `Gemma2ForCausalLM.forward`; `Gemma2Model.forward` says what is refused."""
        loss_options = {name: options.pop(name) for name in LOSS if name in options}
        seen = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            return_dict=True,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.whole.softcap(self.lm_head(seen.last_hidden_state[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=seen.past_key_values,
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )
        return output if self.wanted("return_dict", return_dict) else output.to_tuple()

    def get_output_embeddings(self) -> Head:
        return self.lm_head

    def create_masks_for_generate(
        self, config: Any, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor | None:
        """generate() asks for masks [b h t s] here where a cache has a fixed shape; ours are made from columns."""
        return attention_mask


def foreign_config(model: Gemma2, ids: dict[str, Any]) -> transformers.Gemma2Config:
    """transformers' config of the same shape."""
    shape = {name: value for name, value in config_dict(model.config).items() if name != "model_type"}
    scalar = shape["query_pre_attn_scalar"]
    if float(scalar).is_integer():  # transformers takes no float here, and an integer is what it is
        shape["query_pre_attn_scalar"] = int(scalar)
    dtype = str(model.dtype).removeprefix("torch.")
    return transformers.Gemma2Config(**shape, **ids, dtype=dtype, attn_implementation="eager")
