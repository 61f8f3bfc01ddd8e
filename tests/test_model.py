"""The modules: what they let one observe and edit, in which dtype they compute, and that they keep nothing."""

from __future__ import annotations

import shutil
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gemma2 import Gemma2, HybridCache
from gemma2.checkpoints.hf_config import config_dict
from gemma2.model import RMSNorm, ScaledEmbedding, Tap
from gemma2.numerics import PROFILES, with_numerics
from tests.conftest import ids, tiny
from tests.test_static import Counting

# TransformerLens's name -> our module below a block or at the top, and the shape with b=2, t=20 in tiny("27b"):
# d=288, h=8, g=4, c=16, f=2304.
IN_BLOCK = {
    "attn.hook_q": ("self_attn.hook_q", (2, 20, 8, 16)),
    "attn.hook_k": ("self_attn.hook_k", (2, 20, 4, 16)),
    "attn.hook_v": ("self_attn.hook_v", (2, 20, 4, 16)),
    "attn.hook_rot_q": ("self_attn.hook_rot_q", (2, 20, 8, 16)),
    "attn.hook_rot_k": ("self_attn.hook_rot_k", (2, 20, 4, 16)),
    "attn.hook_scores_raw": ("self_attn.attend.hook_scores_raw", (2, 8, 20, 20)),
    "attn.hook_attn_scores": ("self_attn.attend.hook_attn_scores", (2, 8, 20, 20)),
    "attn.hook_pattern": ("self_attn.attend.hook_pattern", (2, 8, 20, 20)),
    "attn.hook_z": ("self_attn.attend.hook_z", (2, 20, 8, 16)),
    "hook_attn_out": ("post_attention_layernorm", (2, 20, 288)),
    "hook_resid_mid": ("hook_resid_mid", (2, 20, 288)),
    "mlp.hook_pre": ("mlp.gate_proj", (2, 20, 2304)),
    "mlp.hook_pre_linear": ("mlp.up_proj", (2, 20, 2304)),
    "mlp.hook_post": ("mlp.hook_post", (2, 20, 2304)),
    "hook_mlp_out": ("post_feedforward_layernorm", (2, 20, 288)),
    "hook_resid_post": ("", (2, 20, 288)),
    "ln1.hook_normalized": ("input_layernorm.hook_normalized", (2, 20, 288)),
    "ln1_post.hook_normalized": ("post_attention_layernorm.hook_normalized", (2, 20, 288)),
    "ln2.hook_normalized": ("pre_feedforward_layernorm.hook_normalized", (2, 20, 288)),
    "ln2_post.hook_normalized": ("post_feedforward_layernorm.hook_normalized", (2, 20, 288)),
    "ln1.hook_scale": ("input_layernorm.hook_inv_scale", (2, 20, 1)),
}
AT_TOP = {
    "hook_embed": ("model.embed_tokens", (2, 20, 288)),
    "ln_final.hook_normalized": ("model.norm.hook_normalized", (2, 20, 288)),
    "ln_final": ("model.norm", (2, 20, 288)),
    "logits_raw": ("lm_head", (2, 20, 512)),
    "logits": ("softcap", (2, 20, 512)),
}


@torch.no_grad()
def observed(model: Gemma2, tokens: Tensor) -> dict[str, Tensor]:
    """Every module's output by its path, but for cosines and sines, which are a pair, and positions."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, inputs, output, path=path: seen.__setitem__(path, output))
        for path, module in model.named_modules()
        if not path.endswith(("rotary_emb", "hook_key_positions"))
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_site_is_the_output_of_a_module_in_its_shape() -> None:
    seen = observed(tiny("27b"), ids(2, 20))
    for layer in range(4):
        for site, (path, shape) in IN_BLOCK.items():
            assert seen[f"model.layers.{layer}.{path}".rstrip(".")].shape == shape, site
    for site, (path, shape) in AT_TOP.items():
        assert seen[path].shape == shape, site


def test_the_residual_identities_are_exact() -> None:
    seen = observed(tiny("2b"), ids(2, 40))
    before = seen["model.embed_tokens"]
    for layer in range(4):
        at = f"model.layers.{layer}"
        middle = seen[f"{at}.hook_resid_mid"]
        assert torch.equal(before + seen[f"{at}.post_attention_layernorm"], middle)
        assert torch.equal(middle + seen[f"{at}.post_feedforward_layernorm"], seen[at])
        before = seen[at]


def test_patterns_sum_to_one_and_are_zero_outside_the_window() -> None:
    seen = observed(tiny("2b"), ids(1, 40))
    local, global_ = (seen[f"model.layers.{i}.self_attn.attend.hook_pattern"][0] for i in (0, 1))
    back = torch.arange(40)[:, None] - torch.arange(40)
    assert torch.allclose(local.sum(-1), torch.ones(8, 40))
    assert (local[:, (back < 0) | (back >= 16)] == 0).all() and (local[:, (back >= 0) & (back < 16)] > 0).any()
    assert (global_[:, back < 0] == 0).all() and (global_[:, back >= 16] > 0).any()


def test_a_tap_lets_one_edit_what_flows_on() -> None:
    model, tokens = tiny(), ids(1, 20)
    for path in ("self_attn.hook_v", "self_attn.attend.hook_pattern", "mlp.hook_post", "hook_resid_mid"):
        tap = model.model.layers[2].get_submodule(path)
        assert isinstance(tap, Tap)
        with torch.no_grad():
            plain = model(tokens)
            hook = tap.register_forward_hook(lambda m, inputs, output: torch.zeros_like(output))
            assert not torch.equal(model(tokens), plain), path
            hook.remove()
            assert torch.equal(model(tokens), plain), path


def test_in_float64_every_module_computes_in_float64() -> None:
    seen = observed(tiny().double(), ids(1, 20))
    assert {output.dtype for output in seen.values()} == {torch.float64}


def test_in_bfloat16_norms_are_float32_inside_and_the_rest_bfloat16() -> None:
    seen = observed(tiny().bfloat16(), ids(1, 20))
    for path, output in seen.items():
        inside = path.endswith(("hook_inv_scale", "hook_normalized"))
        assert output.dtype == (torch.float32 if inside else torch.bfloat16), path


@pytest.mark.parametrize(("width", "rounded"), [(2304, 48.0), (3584, 59.75), (4608, 68.0)])
def test_the_embedding_scale_is_rounded_to_the_weights_dtype(width: int, rounded: float) -> None:
    config = tiny(hidden_size=width, intermediate_size=8, num_hidden_layers=1).config
    embed = ScaledEmbedding(config).bfloat16()
    row = embed(torch.tensor([[7]]))[0, 0]
    assert torch.equal(row, embed.weight[7] * torch.tensor(rounded, dtype=torch.bfloat16))


def test_rms_norm_adds_one_to_its_weight_in_float32() -> None:
    norm = RMSNorm(4, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.fill_(0.123)  # 1 + 0.123 is not a bfloat16: rounding it first would show
    x = torch.tensor([1.0, -2.0, 3.0, 4.0]).bfloat16()
    wide = x.float()
    expected = wide * torch.rsqrt(wide.pow(2).mean() + 1e-6) * (1 + norm.weight.float())
    assert torch.equal(norm(x), expected.bfloat16())


def test_padding_that_sees_nothing_stays_finite() -> None:
    model, tokens = tiny(), ids(1, 20)
    positions = torch.arange(20)[None] - 12
    logits = model(tokens, positions)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert torch.allclose(logits[:, 12:], model(tokens[:, 12:]), atol=3e-4)


def test_the_head_is_the_embedding_and_there_is_no_other_parameter() -> None:
    model = tiny()
    assert not list(model.lm_head.parameters())
    assert [name for name, _ in model.named_buffers()] == ["model.rotary_emb.inv_freq"]
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    model(ids(1, 5)).sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_a_model_with_random_weights_is_finite_from_the_start() -> None:
    torch.manual_seed(0)
    model = Gemma2(tiny().config)
    assert model(ids(2, 30)).isfinite().all()


def test_the_model_keeps_nothing_between_calls() -> None:
    model = tiny()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with torch.no_grad():
        model(ids(1, 20), cache=HybridCache(model.config, 1, 20))
    for name, module in model.named_modules():
        assert module.__dict__ == before[name], name


def test_ids_are_checked_at_the_front_door() -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tiny()(torch.tensor([[1, 512]]))


@pytest.mark.parametrize("with_head", [True, False], ids=["with lm_head", "without"])
def test_the_state_dict_of_transformers_loads_strictly(with_head: bool) -> None:
    transformers = pytest.importorskip("transformers")
    said = config_dict(tiny("2b").config)
    theirs = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**said, attn_implementation="eager")).eval()
    state = theirs.state_dict()
    assert "lm_head.weight" in state
    if not with_head:
        del state["lm_head.weight"]
    ours = Gemma2(tiny("2b").config)
    ours.load_state_dict(state, strict=True)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in state.items() if "lm_head" not in name)
    with torch.no_grad():
        assert torch.equal(deepcopy(ours)(ids(1, 20)), theirs(ids(1, 20)).logits)


def test_a_head_of_its_own_is_no_gemma_2() -> None:
    model = tiny("2b")
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["lm_head.weight"][5, 3] += 1.0
    with pytest.raises(RuntimeError, match=r"lm_head.weight differs from model.embed_tokens.weight, and .* is tied"):
        model.load_state_dict(state)
    del state["model.embed_tokens.weight"]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


def test_a_state_dict_carries_the_whole_model() -> None:
    model = tiny()
    assert isinstance(model, nn.Module)
    copy = Gemma2(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(copy.eval()(ids(1, 20)), model(ids(1, 20)))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on CPU")
@torch.no_grad()
@pytest.mark.long
def test_the_compiled_model_computes_what_the_eager_one_does() -> None:
    model = tiny(num_hidden_layers=2).double()
    tokens = ids(1, 40)
    assert (torch.compile(model.model)(tokens) - model.model(tokens)).abs().max() <= 1e-10


@pytest.mark.long
def test_a_full_graph_is_compiled_of_a_pass_and_of_a_decode_step() -> None:
    torch.compiler.reset()
    model, tokens, backend = tiny().double(), ids(2, 60), Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert (compiled(tokens) - model(tokens)).abs().max() <= 1e-10
        assert backend.graphs == 1
        cache, whole = HybridCache(model.config, 2, 60), model(tokens)
        steps = [compiled(tokens[:, i : i + 1], cache=cache) for i in range(60)]
        assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-10
    assert backend.graphs <= 6, "columns are numbers that may change, not constants: else every step is a graph"


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@torch.no_grad()
def test_the_model_is_exported_for_any_length(strict: bool) -> None:
    model, tokens = tiny(num_hidden_layers=2), ids(1, 20)
    shapes = ({1: torch.export.Dim("t", min=2, max=200)},)
    program = torch.export.export(model, (tokens,), dynamic_shapes=shapes, strict=strict).module()
    for t in (20, 37):
        assert torch.equal(program(ids(1, t, seed=t)), model(ids(1, t, seed=t)))


@torch.no_grad()
def test_vmap_over_rows_and_gradients_of_each_sample() -> None:
    model, tokens = tiny(num_hidden_layers=2).double(), ids(3, 12)
    rows = torch.vmap(lambda row: model(row[None])[0])(tokens)
    assert (rows - model(tokens)).abs().max() <= 1e-10
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row[None],))[0, -1].square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    name = "model.layers.1.mlp.down_proj.weight"
    for row, found in zip(tokens, each[name], strict=True):
        expected = torch.func.grad(loss)(parameters, row)[name]
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_meta_and_fake_tensors_pass_through() -> None:
    with torch.device("meta"):
        model = Gemma2(tiny().config)
    assert model(torch.empty(2, 7, dtype=torch.int64, device="meta"), last=3).shape == (2, 3, 512)
    with FakeTensorMode():
        fake = Gemma2(tiny().config)
        cache = HybridCache(fake.config, 2, 20)
        assert fake(torch.ones(2, 7, dtype=torch.int64), cache=cache).shape == (2, 7, 512)
        assert fake(torch.ones(2, 1, dtype=torch.int64), cache=cache).shape == (2, 1, 512)


@torch.no_grad()
def test_the_last_logits_alone_are_those_of_all_positions() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, tokens = tiny().to(dtype), ids(2, 40)
        assert torch.allclose(
            model(tokens, last=3), model(tokens)[:, -3:], atol=1e-4 if dtype == torch.float32 else 0.5
        )
        assert model(tokens, last=40).shape == (2, 40, 512)


def test_rotary_frequencies_move_with_the_model_and_keep_their_dtype() -> None:
    """Rounded to bfloat16 they would put position 8,191 more than a radian off."""
    model = tiny(head_dim=64)
    expected = model.model.rotary_emb.inv_freq.clone()
    for moved in (model.bfloat16(), model.double(), model.float(), model.to(torch.float16)):
        assert torch.equal(moved.model.rotary_emb.inv_freq, expected)
    assert model.to("meta").model.rotary_emb.inv_freq.device.type == "meta"
    assert torch.equal(model.to_empty(device="cpu").model.rotary_emb.inv_freq, expected)


@torch.no_grad()
def test_a_head_whose_weight_was_moved_away_is_refused_with_the_cure() -> None:
    """As accelerate's offload of the whole model does: PyTorch itself would answer with uninitialised memory."""
    accelerate = pytest.importorskip("accelerate")
    plain = tiny()(ids(1, 9))
    for profile in PROFILES:
        with pytest.raises(RuntimeError, match="cannot be offloaded by itself"):
            accelerate.cpu_offload(with_numerics(tiny(), profile), "cpu")(ids(1, 9))
    with pytest.raises(
        RuntimeError, match="cannot be offloaded by itself, because the head reads it too; offload the layers"
    ):
        accelerate.cpu_offload(tiny(), "cpu")(ids(1, 9))
    model = tiny()
    accelerate.cpu_offload(model.model.layers, "cpu")
    assert torch.equal(model(ids(1, 9)), plain)
