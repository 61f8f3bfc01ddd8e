"""The small files that are written beside weights: config, tokenizer and its settings, end ids, chat template.

What a source states there for other programs is passed on as it stands, and never interpreted: special tokens by name,
and how to generate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from gemma2.checkpoints.added_tokens import LISTED, NAMED
from gemma2.checkpoints.beside import CONFIG, GENERATION, TOKENIZER, id_of, tuned_by
from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.dtypes import dtype_name
from gemma2.checkpoints.hf_config import config_dict
from gemma2.checkpoints.tokenizer_json_write import tokenizer_json
from gemma2.checkpoints.vocabulary import AS_TYPED
from gemma2.tokenizer import Tokenizer


def small_files(opened: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """The small files of a checkpoint, name -> content.

    Args:
        dtype: of the weights, which config.json states; None for a `.ckpt`.
    """
    tokenizer, special = opened.tokenizer, opened.tokenizer.special
    ids = {f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")}
    stated = {} if dtype is None else {"torch_dtype": dtype_name(dtype)}
    named = _named(opened.companions.get(TOKENIZER, {}), tokenizer)
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": tokenizer.piece(special[name]) for name in ("bos", "eos", "unk", "pad")},
        **named,
        **({} if tokenizer.added is None else {AS_TYPED: True}),
        **({} if opened.chat_template is None else {"chat_template": opened.chat_template}),
    }
    files: dict[str, Any] = {
        CONFIG: {**config_dict(opened.config), **ids, **opened.companions.get(CONFIG, {}), **stated},
        TOKENIZER: settings,
    }
    generation = _generation(opened, ids, settings["eos_token"])
    if generation is not None:
        files[GENERATION] = generation
    texts = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    # transformers reads tokenizer.json, for which it needs no other package. A .ckpt's readers know tokenizer.model.
    fast = tokenizer_json(tokenizer) if dtype is not None or tokenizer.added is not None else None
    return texts | {"tokenizer.model": tokenizer.to_proto()} | ({} if fast is None else {"tokenizer.json": fast})


def _generation(opened: Checkpoint, ids: Mapping[str, int], eos: object) -> dict[str, Any] | None:
    """What generation_config.json says: what it said, and the ids at which a text ends; None where there are none to
    state. `eos` is the token that the tokenizer's settings name."""
    special, stated = opened.tokenizer.special, opened.companions.get(GENERATION)
    own = sorted(opened.tokenizer.end_ids, key=lambda id: id != special["eos"])  # <eos> first
    more = sorted(opened.end_ids - set(own))
    stops = (own if opened.chat_tuned else own[:1]) + more
    ends = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    if stated is not None:
        return dict(stated) if _says_the_same(opened, stated, eos) else dict(stated) | ends
    return dict(ids) | ends if more or (opened.chat_tuned is not None and "end_of_turn" in special) else None


def _says_the_same(opened: Checkpoint, stated: Mapping[str, Any], eos: object) -> bool:
    """Whether a source's generation_config.json, with the tokenizer's `eos`, still says where a text ends and whether
    the model was tuned for chat."""
    found = stated.get("eos_token_id")
    listed = [*(found if isinstance(found, list) else [found]), id_of(eos, opened.tokenizer)]
    ends = {id for id in listed if type(id) is int}
    gemmas, tuned = opened.tokenizer.end_ids, tuned_by(opened.chat_template, ends, opened.tokenizer)
    return ends | gemmas == opened.end_ids | gemmas and tuned == opened.chat_tuned


def _named(stated: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Special tokens by their names, as far as they are in the vocabulary: others would get rows of their own."""
    known = {key: value for key, value in stated.items() if key not in LISTED}
    known = {key: value for key, value in known.items() if key not in NAMED or id_of(value, tokenizer) is not None}
    for key in LISTED:
        tokens = stated.get(key)
        if isinstance(tokens, Mapping):
            known[key] = {name: one for name, one in tokens.items() if id_of(one, tokenizer) is not None}
        elif isinstance(tokens, list):
            known[key] = [one for one in tokens if id_of(one, tokenizer) is not None]
    return known
