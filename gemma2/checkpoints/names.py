"""What checkpoints of Hugging Face's kind call the tensors of a Gemma 2, and what each name means.

Training programs wrap modules, and a wrapper's name becomes part of the names of the tensors below it. Programs that
hold a model inside a larger one put a prefix before all its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gemma2.errors import BadModelFile

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel, DistributedDataParallel and DeepSpeed",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_fpw_module": "FairScale's FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
REDUNDANT = ".rotary_emb.inv_freq"  # computed from the config; some exporters store it
TOKENIZER = "spiece_model"  # ComfyUI's text encoders in one file hold their tokenizer as a tensor of this name
BASE = "model."  # Gemma2Model alone, the model without its head, writes its names without it
INSIDE = ("embed_tokens", "layers", "norm")
# `outer` is what a larger model puts before the names of the Gemma 2 inside it.
_NAME = re.compile(
    r"(?P<outer>(?:.*?\.)??)(?P<own>(?:model\.)?(?:embed_tokens\.weight|norm\.weight|layers\.\d+\..*)|lm_head\.weight)",
    re.DOTALL,
)
LONGEST = 150  # characters of a tensor's name in a message: files can have names of any length


def shown(name: str) -> str:
    """A tensor's name for a message."""
    return name if len(name) <= LONGEST else f"{name[:LONGEST]} ..."


def unwrapped(name: str) -> str:
    """A tensor's name without the names of wrappers, which stand before it or between its steps."""
    return ".".join(step for step in name.split(".") if step not in WRAPPERS)


def plain_name(name: str) -> str:
    """A tensor's name without wrappers, and with the prefix that `Gemma2Model` alone does not write."""
    plain = unwrapped(name)
    return BASE + plain if plain.split(".", 1)[0] in INSIDE else plain


def own_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Hugging Face's name of each tensor -> the name in the file; a name that means no tensor of Gemma 2 is kept.

    A prefix that all names of a Gemma 2 share is left out, and what has several prefixes is kept as it is.

    Raises:
        BadModelFile: two names mean one tensor.
    """
    bare = {name: unwrapped(name) for name in names}
    found = {name: _NAME.fullmatch(plain) for name, plain in bare.items()}
    outer = {match["outer"] for match in found.values() if match}
    own: dict[str, str] = {}
    for name, plain in bare.items():
        match = found[name]
        plain = plain_name(match["own"] if match is not None and len(outer) == 1 else plain)
        if plain in own:
            raise BadModelFile(
                f"{where}: {shown(own[plain])} and {shown(name)} are the same tensor, so one of them must go"
            )
        own[plain] = name
    return own


def outer_prefix(own: dict[str, str]) -> str:
    """The prefix of a larger model that `own_names` left out, or nothing."""
    for plain, name in own.items():
        match = _NAME.fullmatch(unwrapped(name))
        if match and match["outer"] and plain != unwrapped(name):
            return match["outer"]
    return ""
