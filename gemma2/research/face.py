"""transformers' face: the same parameters as one of its models, for its tools and for those built on it."""

from __future__ import annotations

from typing import Any

from gemma2.gemma import Gemma
from gemma2.model import Gemma2
from gemma2.research.watch import model_of

PUBLISHED_IDS = {"bos": 2, "eos": 1, "pad": 0}  # of Google's vocabulary, for a model without its tokenizer


def as_transformers(gemma: Gemma | Gemma2) -> Any:
    """A `transformers.PreTrainedModel` with `generate`, around the parameters of `gemma`. Needs transformers 5.

    The parameters are the same objects under the same names, so training or adapting one changes the other. Logits,
    loss and generated ids are those of transformers' own Gemma 2 with eager attention. The config is a
    `transformers.Gemma2Config`; `generation_config.eos_token_id` holds the `stop_ids` of a `Gemma`, and `<eos>` alone
    for a model without its tokenizer. What else the checkpoint's generation_config.json says is in it too.

    Raises:
        ImportError: transformers is missing or older.
        ValueError: neither a `Gemma` nor a `Gemma2`.
    """
    try:
        from gemma2.research.pretrained import Gemma2ForCausalLM
    except ImportError as error:
        raise ImportError(f"as_transformers needs transformers 5: pip install transformers ({error})") from None
    if not isinstance(gemma, Gemma):
        ids: dict[str, Any] = {f"{name}_token_id": token for name, token in PUBLISHED_IDS.items()}
        return Gemma2ForCausalLM(model_of(gemma), ids, ids | {"eos_token_id": [PUBLISHED_IDS["eos"]]})
    ids = {f"{name}_token_id": gemma.tokenizer.special[name] for name in PUBLISHED_IDS}
    settings = ids | dict(gemma.companions.get("generation_config.json", {})) | {"eos_token_id": sorted(gemma.stop_ids)}
    return Gemma2ForCausalLM(model_of(gemma), ids | dict(gemma.companions.get("config.json", {})), settings)
