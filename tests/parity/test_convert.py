"""What is written here, transformers loads: safetensors and GGUF, with the same logits and the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gemma2
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.convert import TYPES, convert
from tests.conftest import SHAPES, ids, raw_config, tensors_of, tiny
from tests.hostile.conftest import shell

transformers = pytest.importorskip("transformers", reason="the live comparison needs the extra gemma2[transformers]")

# Rows of whole blocks in every type. transformers reads no query scale from a GGUF and takes 256, and reads no caps.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
TEXTS = [
    "In the beginning",
    "",
    "  two  spaces\n\n\ttab",
    "日本語 café 🙂 \u200b",
    "1234567 + 8.9",
    "<b>hi</b><table>",
    "<start_of_turn>user\nhi<end_of_turn>\n<unused7>",
]


def source(tmp_path: Path, size: str, dtype: torch.dtype, **changes: Any) -> Path:
    changes = {**raw_config(size), "vocab_size": 4096, **changes}
    place = shell(tmp_path / "source", **changes)
    tensors = tensors_of(tiny(size, **changes))
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, place / SINGLE)
    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SHAPES)
@torch.no_grad()
def test_a_folder_has_bit_equal_logits_in_transformers(size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    google = convert(source(tmp_path, size, dtype), tmp_path / "model.ckpt", progress=False).path
    folder = convert(google, tmp_path / "out", progress=False).path
    external, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="auto", output_loading_info=True
    )
    assert external.dtype == dtype and not any(found.values()), found
    tokens = ids(2, 77, vocab=4096)
    assert torch.equal(gemma2.load(folder, device="cpu").model(tokens), external(tokens, use_cache=False).logits)


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
@pytest.mark.long
def test_a_gguf_has_bit_equal_logits_in_transformers(kind: str, tmp_path: Path) -> None:
    """transformers dequantises by itself, to float32. Its w of a norm is g - 1, whose 1 + w is g again, as ours is."""
    pytest.importorskip("accelerate", reason="transformers needs it for GGUF")
    path = convert(source(tmp_path, "2b", torch.float32, **WIDE), tmp_path / "x.gguf", type=kind, progress=False).path
    external = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, attn_implementation="eager", dtype=torch.float32
    )
    model = gemma2.load(path, dtype="float32", device="cpu").model
    assert external.config.sliding_window == model.config.sliding_window == 16
    tokens = ids(2, 77, vocab=4096)
    ours, theirs = model(tokens), external(tokens, use_cache=False).logits
    assert torch.equal(ours, theirs), (ours - theirs).abs().max()


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_texts_have_the_same_ids_in_transformers(form: str, tmp_path: Path) -> None:
    """There, control pieces in a text are always taken as such. The chat template is there too."""
    pytest.importorskip("google.protobuf", reason="transformers needs it for tokenizer.model")
    place = source(tmp_path, "2b", torch.float32)
    (place / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}", encoding="utf-8")
    path = convert(place, tmp_path / ("out" if form == "folder" else "out.gguf"), progress=False).path
    named = {"gguf_file": path.name} if form == "gguf" else {}
    external = transformers.AutoTokenizer.from_pretrained(path if form == "folder" else tmp_path, **named)
    own = gemma2.load(path, device="cpu").tokenizer
    for text in TEXTS:
        assert external(text)["input_ids"] == own.encode(text, special=True), text
    turns = [{"role": "user", "content": "hi"}]
    assert external.apply_chat_template(turns, tokenize=False) == "<bos>hi"
    special = {name: getattr(external, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    assert special == {name: own.special[name] for name in special}
