"""A GGUF becomes the model that llama.cpp would run: names, norms, and what it decides where a file is silent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gemma2
from gemma2.checkpoints.ggml import TYPES, GGMLType
from gemma2.checkpoints.gguf import GGUF, TensorInfo, Value, read_header
from gemma2.checkpoints.gguf_weights import config_of, hugging_face_name, llama_cpp_name
from gemma2.checkpoints.hf_config import published_config
from gemma2.checkpoints.weights import shapes_of
from gemma2.config import GLOBAL, LOCAL
from tests.conftest import ids
from tests.gguf_files import KINDS, File, split, tiny_model, weight

NORM = "blk.0.attn_norm.weight"
OWN = "model.layers.0.input_layernorm.weight"


def written(tmp_path: Path, file: File, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(file.write())
    return path


def loaded(tmp_path: Path, file: File, dtype: str | None = None) -> gemma2.Gemma:
    return gemma2.load(written(tmp_path, file), dtype=dtype, device="cpu", progress=False)


def with_norm(gains: np.ndarray, name: str = NORM) -> File:
    return tiny_model().with_tensor(name, data=gains.astype("<f4").tobytes())


# What a file leaves out.


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("gemma2.attention.sliding_window", "sliding_window", 4096),
        ("gemma2.attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        ("gemma2.final_logit_softcapping", "final_logit_softcapping", 30.0),
        ("gemma2.rope.freq_base", "rope_theta", 10000.0),
        ("gemma2.attention.sliding_window_pattern", "layer_types", (LOCAL, GLOBAL)),
    ],
)
def test_what_is_not_stated_is_decided_as_by_llama_cpp_and_said(
    tmp_path: Path, key: str, field: str, value: object
) -> None:
    config, notes = config_of(read_header(written(tmp_path, tiny_model().without(key))))
    assert getattr(config, field) == value
    assert sum(note.startswith(f"{key} is not stated") for note in notes) == 1


def test_what_is_stated_is_taken_and_not_mentioned(tmp_path: Path) -> None:
    file = tiny_model().with_pair("gemma2.rope.freq_base", "f32", 500.0)
    file = file.with_pair("gemma2.attention.sliding_window", "u32", 8)
    file = file.with_pair("gemma2.attn_logit_softcapping", "f32", 40.0).with_pair(
        "gemma2.final_logit_softcapping", "f32", 20.0
    )
    file = file.with_pair("gemma2.attention.sliding_window_pattern", "bool[]", [False, True])
    config, notes = config_of(read_header(written(tmp_path, file)))
    assert (config.rope_theta, config.sliding_window) == (500.0, 8)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (40.0, 20.0)
    assert config.layer_types == (GLOBAL, LOCAL)
    assert len(notes) == 1 and notes[0].startswith("no key states the query scale: 8 ** -0.5, the width of a head")
    assert config.rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [(0, (LOCAL, LOCAL)), (1, (GLOBAL, GLOBAL)), (2, (LOCAL, GLOBAL)), (3, (LOCAL, LOCAL))],
)
def test_a_pattern_makes_the_last_of_so_many_layers_global(
    tmp_path: Path, pattern: int, kinds: tuple[str, str]
) -> None:
    file = tiny_model().with_pair("gemma2.attention.sliding_window_pattern", "u32", pattern)
    assert config_of(read_header(written(tmp_path, file)))[0].layer_types == kinds


@pytest.mark.parametrize(("name", "scale"), [("gemma-2-2b", 256), ("gemma-2-9b", 256), ("gemma-2-27b", 144)])
def test_each_published_size_gets_its_query_scale(name: str, scale: int) -> None:
    """46 layers are the 27B, whose queries are scaled by the width by the heads: no key says so."""
    config = published_config(name)
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
    }
    metadata = {f"gemma2.{key}": Value("u32", value) for key, value in keys.items()}
    metadata["gemma2.attention.layer_norm_rms_epsilon"] = Value("f32", np.float32(1e-6).item())
    metadata["general.architecture"] = Value("str", "gemma2")
    kind = next(iter(shapes_of(config)))
    embedding = TensorInfo(shapes_of(config)[kind], _f32(), Path("x"), 0)
    found, notes = config_of(GGUF(Path("x"), 3, 32, metadata, {"token_embd.weight": embedding}, 0))
    assert found == config and found.query_pre_attn_scalar == scale
    assert sum(f"{scale} ** -0.5" in note for note in notes) == 1


def _f32() -> GGMLType:
    return TYPES[0]


def test_every_name_of_a_gemma_2_has_its_place_in_both_directions() -> None:
    names = list(shapes_of(published_config("gemma-2-27b")))
    theirs = [llama_cpp_name(name) for name in names]
    assert len(set(theirs)) == 508 and [hugging_face_name(name) for name in theirs] == names
    for strange in ("blk.00.attn_q.weight", "blk.0.attn_q", "blk.x.attn_q.weight", "blk.0.weight", "attn_q.weight", ""):
        assert hugging_face_name(strange) is None


# Weights.


def test_matrices_are_the_files_blocks_rounded_once_and_norms_give_its_gains(tmp_path: Path) -> None:
    import gguf
    from gguf import quants

    file = tiny_model("Q4_K")
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded(tmp_path, file, str(dtype).removeprefix("torch.")).model
        for name, parameter in model.named_parameters():
            entry = file.tensor(llama_cpp_name(name))
            raw = np.frombuffer(entry.data, np.uint8)
            kind = gguf.GGMLQuantizationType(KINDS[str(entry.kind)][0])
            wide = torch.from_numpy(np.array(quants.dequantize(raw, kind), np.float32)).view(parameter.shape)
            if parameter.ndim == 1:
                assert torch.equal((1.0 + parameter.double()).float(), wide), name
            else:
                assert torch.equal(parameter, wide.to(dtype)), name


def test_a_quantized_file_is_run_in_bfloat16_and_an_f32_file_in_float32_unless_asked(tmp_path: Path) -> None:
    for kind, dtype in (("F32", torch.float32), ("Q8_0", torch.bfloat16), ("F16", torch.bfloat16)):
        assert loaded(tmp_path, tiny_model(kind)).model.dtype == dtype


def test_gains_made_from_bfloat16_weights_are_bfloat16_weights_again(tmp_path: Path) -> None:
    w = torch.randn(32, generator=torch.Generator().manual_seed(0)).bfloat16()
    model = loaded(tmp_path, with_norm((1.0 + w.float()).numpy()), "bfloat16").model
    assert model.get_parameter(OWN).dtype == torch.bfloat16 and torch.equal(model.get_parameter(OWN), w)


def test_gains_that_a_narrow_weight_cannot_give_keep_a_wider_one(tmp_path: Path) -> None:
    """In the norm 1 + w is then the file's gain to the bit, whatever dtype the model runs in."""
    from_float32 = 1.0 + torch.randn(32, generator=torch.Generator().manual_seed(1))
    any_gain = from_float32.clone()
    any_gain[3] = 0.1  # no float32 w gives it
    for gains, dtype in ((from_float32, torch.float32), (any_gain, torch.float64)):
        model = loaded(tmp_path, with_norm(gains.numpy()), "bfloat16").model
        kept = model.get_parameter(OWN)
        assert kept.dtype == dtype
        assert torch.equal((1.0 + kept).float(), gains)
        assert model(ids(1, 20, vocab=4096)).dtype == torch.bfloat16


def test_weights_that_a_gain_has_lost_bits_of_come_from_beside_it(tmp_path: Path) -> None:
    w = torch.full((32,), 1e-6).bfloat16().float()
    w[0] = 0.25
    gains = 1.0 + w
    file = with_norm(gains.numpy()).with_pair(f"gemma2.norm_weight.{NORM}", "f32[]", w.tolist())
    assert torch.equal(loaded(tmp_path, file, "bfloat16").model.get_parameter(OWN), w.bfloat16())
    file = file.with_pair(f"gemma2.norm_weight.{NORM}", "f32[]", (2 * w).tolist())
    with pytest.raises(gemma2.BadModelFile, match=rf"gemma2.norm_weight.{NORM} plus 1 is not tensor {NORM}"):
        loaded(tmp_path, file)


def test_a_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    file = tiny_model()
    embedding = file.tensor("token_embd.weight")
    assert loaded(tmp_path, file.plus(replace(embedding, name="output.weight")))
    with pytest.raises(gemma2.BadModelFile, match=r"output.weight differs from the embedding; Gemma 2's head is tied"):
        loaded(tmp_path, file.plus(weight("output.weight", (4096, 32), "F32")))


def test_a_rotary_table_in_the_file_is_left_aside(tmp_path: Path) -> None:
    assert loaded(tmp_path, tiny_model().plus(weight("rope_freqs.weight", (4,), "F32")))


def test_any_part_of_a_split_file_leads_to_the_whole(tmp_path: Path) -> None:
    file = tiny_model()
    whole = dict(loaded(tmp_path, file).model.named_parameters())
    paths = [tmp_path / f"tiny-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for path, part in zip(paths, split(file, (10, 1, len(file.tensors) - 11)), strict=True):
        path.write_bytes(part.write())
    for path in paths:
        parts = dict(gemma2.load(path, device="cpu", progress=False).model.named_parameters())
        assert all(torch.equal(whole[name], parts[name]) for name in whole) and len(whole) == len(parts)
    paths[1].unlink()
    with pytest.raises(gemma2.BadModelFile, match=r"1 of 3 parts missing: tiny-00002-of-00003.gguf"):
        gemma2.load(paths[0])


def test_loading_leaves_the_number_of_threads_as_it_was(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loaded(tmp_path, tiny_model())
        assert torch.get_num_threads() == 2
        with pytest.raises(gemma2.BadModelFile, match="NaN or infinity"):
            loaded(tmp_path, with_norm(np.full(32, np.nan)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_notes_of_a_file_are_with_the_model(tmp_path: Path) -> None:
    notes = loaded(tmp_path, tiny_model()).notes
    assert any("query scale" in note for note in notes) and gemma2.load(device="cpu").notes == ()
