"""The verdict and its cases: a sound system passes them all, and each finds a system that is broken in its way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile, ContextOverflow, NonFiniteError
from gemma2.load import POCKET
from gemma2.model import Gemma2
from gemma2.numerics import PROFILES
from gemma2.numerics.parts import LinearInParts
from gemma2.parity.cases import AGREES, DIFFERS, NOT_RUN, Case, run_cases
from gemma2.parity.judge import DIFFERENCE, EQUAL, ROUNDING, explain, judge
from gemma2.parity.references import CannotDo, Reference, open_reference, spans
from gemma2.parity.references.ourselves import Ourselves
from gemma2.tokens import left_padded
from gemma2.twins import replaced
from tests.conftest import COMMON, SHAPES, ids, tensors_of, tiny
from tests.parity.injected import (
    BUGS,
    Inject,
    at,
    changed,
    layers_swapped,
    no_final_cap,
    no_score_cap,
    scaled_by_width,
    window_one_wider,
)

SMALL = {**SHAPES["2b"], "num_hidden_layers": 2}
BOS = 2
ROW = [BOS, *ids(1, 47, vocab=4096)[0].tolist()]
WINDOW = 12  # of the cases: a quarter of the ids
BEGINS, CONFIG, PROMPT, LAYERS, SCALE, CAPS, CACHED, CHUNKED, RAGGED = (
    "begins with <bos>",
    "config",
    "prompt longer than the window",
    "layer order",
    "query scale",
    "magnitude of capped values",
    "cached against uncached",
    "chunked prefill",
    "ragged against solo",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def ours(opened: Checkpoint) -> Ourselves:
    return Ourselves(opened, torch.float32)


def written(place: Path, change: Callable[[Gemma2], object] = lambda model: None, **changes: float) -> Path:
    """A folder with a tiny model, large enough in its weights that the caps saturate."""
    model = tiny("2b", vocab_size=4096, num_hidden_layers=2)
    with torch.no_grad():
        change(model)
    (place / "config.json").write_text(json.dumps({**COMMON, "vocab_size": 4096, **SMALL, **changes}), encoding="utf-8")
    (place / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    save_file(tensors_of(model), place / "model.safetensors")
    return place


class Injected(Ourselves):
    """Ourselves with a mistake, which another window leaves in."""

    def __init__(self, opened: Checkpoint, bug: Inject, dtype: torch.dtype = torch.float32) -> None:
        self.inject = bug
        super().__init__(opened, dtype)

    def _arrange(self, plain: Gemma2, config: Gemma2Config) -> None:
        super()._arrange(plain, config)
        with torch.no_grad():
            self.inject(self._model)


def nothing(model: Gemma2) -> None:
    """The sound one."""


def in_halves(x: Tensor, weight: Tensor) -> Tensor:
    """A product summed in two halves."""
    half = x.shape[-1] // 2
    return F.linear(x[..., :half], weight[:, :half]) + F.linear(x[..., half:], weight[:, half:])


class WideCache(Ourselves):
    """Its cache holds, and decoding sees, one key more than the window."""

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        return Ourselves.cached(Ourselves.with_window(self, self.config.sliding_window + 1), ids, chunks)


class ForgetfulChunks(Ourselves):
    """A chunk after the first sees itself alone."""

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        if max(chunks[1:]) == 1:
            return super().cached(ids, chunks)
        return torch.cat([self.run(ids[start:stop], ["logits"])["logits"] for start, stop in spans(ids, chunks)])


class SeenPadding(Ourselves):
    """Padding counts as tokens."""

    @torch.no_grad()
    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        tokens, _ = left_padded(rows)
        return [found[-len(row) :] for found, row in zip(self._model(tokens), rows, strict=True)]


class OneWay(Ourselves):
    """It can do nothing but one pass, and shows logits alone."""

    def __init__(self, opened: Checkpoint) -> None:
        super().__init__(opened, torch.float32)
        self.sites = frozenset(("logits",))

    def with_window(self, window: int) -> Ourselves:
        raise CannotDo("its window is compiled in")

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        raise CannotDo("it has no cache")

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        raise CannotDo("it takes one row")


class Failing(Ourselves):
    """Its cache and its batches break, as another implementation's code may."""

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        raise RuntimeError("shapes [4, 1] and [4, 2] do not fit\nraised at attention.cpp:17")

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        raise RuntimeError


def outcomes(reference: Reference, ours: Ourselves, row: list[int] = ROW) -> dict[str, Case]:
    return {case.name: case for case in run_cases(reference, ours, row, BOS)}


def differing(found: dict[str, Case]) -> set[str]:
    return {name for name, case in found.items() if case.outcome == DIFFERS}


def test_a_sound_system_agrees_in_every_case(ours: Ourselves, opened: Checkpoint) -> None:
    for spec in ("self", "self:numerics=gemma_pytorch"):
        found = outcomes(open_reference(spec, opened.path), ours)
        assert list(found) == [BEGINS, CONFIG, PROMPT, LAYERS, SCALE, CAPS, CACHED, CHUNKED, RAGGED]
        assert {case.outcome for case in found.values()} == {AGREES}, found
    assert found[PROMPT].detail == f"window {WINDOW}, 48 token ids"
    assert found[LAYERS].detail.startswith("of 48 keys the last query sees 12 in local layers and all")
    assert found[SCALE].detail == "scores are q·k times 0.25; 16 ** -0.5 is 0.25"
    assert "|logits| up to 30 of 30, |blocks.0.attn.hook_attn_scores| up to " in found[CAPS].detail


class Breaking(Ourselves):
    """Ours, with a fault of its own in every pass."""

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        raise RuntimeError("a fault of ours")


def test_an_error_of_our_own_is_not_called_the_other_systems(opened: Checkpoint) -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        outcomes(Ourselves(opened, torch.float32), Breaking(opened, torch.float32))


def test_a_case_in_which_a_system_fails_is_not_run_and_says_with_what(ours: Ourselves, opened: Checkpoint) -> None:
    reference = Failing(opened, torch.float32)
    found = outcomes(reference, ours)
    assert [name for name, case in found.items() if case.outcome == NOT_RUN] == [CACHED, CHUNKED, RAGGED]
    assert found[CACHED].detail == f"{reference.system} failed: shapes [4, 1] and [4, 2] do not fit"
    assert found[RAGGED].detail == f"{reference.system} failed: RuntimeError"
    assert {found[name].outcome for name in (BEGINS, PROMPT, LAYERS, SCALE, CAPS)} == {AGREES}


@pytest.mark.parametrize(
    ("inject", "case", "detail"),
    [
        # Of 48 queries 36 see one key too many, in each of 8 heads.
        (window_one_wider, PROMPT, "hook_attn_scores, 288 keys seen by one system alone"),
        (window_one_wider, LAYERS, "layer 0 sees 13 of 48 keys with window 12, and ours is sliding_attention"),
        (layers_swapped, LAYERS, "layer 0 sees 48 of 48 keys with window 12, and ours is sliding_attention"),
        (scaled_by_width, SCALE, "scores are q·k times 0.2357; 16 ** -0.5 is 0.25"),
        (no_final_cap, CAPS, "|logits| up to 165.6 of 30, |blocks.0.attn.hook_attn_scores| up to 44.13 of 50"),
        (no_score_cap, CAPS, "|logits| up to 30 of 30, |blocks.0.attn.hook_attn_scores| up to 69.36 of 50"),
    ],
)
def test_a_case_differs_where_the_system_is_broken_in_its_way(
    inject: Inject, case: str, detail: str, ours: Ourselves, opened: Checkpoint
) -> None:
    found = outcomes(Injected(opened, inject), ours)
    # These four judge all sites or the logits, which any mistake moves.
    assert differing(found) == {case, PROMPT, CACHED, CHUNKED, RAGGED} | (
        {LAYERS} if inject is window_one_wider else set()
    )
    assert found[case].detail.endswith(detail)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (WideCache, {CACHED, CHUNKED}),
        (ForgetfulChunks, {CHUNKED}),
        (SeenPadding, {RAGGED}),
    ],
)
def test_a_mistake_in_feeding_is_found_by_the_case_that_feeds_so_and_by_no_other(
    broken: type[Ourselves], expected: set[str], ours: Ourselves, opened: Checkpoint
) -> None:
    assert differing(outcomes(broken(opened, torch.float32), ours)) == expected


def test_the_scale_is_measured_from_patterns_where_scores_are_not_shown(ours: Ourselves, opened: Checkpoint) -> None:
    for inject, outcome in ((lambda model: None, AGREES), (scaled_by_width, DIFFERS)):
        theirs = Injected(opened, inject)
        theirs.sites = frozenset(name for name in theirs.sites if not name.endswith(("scores_raw", "attn_scores")))
        found = outcomes(theirs, ours)
        assert found[SCALE].outcome == outcome, found[SCALE]
        assert found[LAYERS].outcome == AGREES


WITHOUT_SCORES = ("scores_raw", "attn_scores")


def without_scores(opened: Checkpoint, inject: Inject, dtype: torch.dtype) -> Injected:
    theirs = Injected(opened, inject, dtype)
    theirs.sites = frozenset(name for name in theirs.sites if not name.endswith(WITHOUT_SCORES))
    return theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_left_out_is_told_from_patterns_where_scores_are_not_shown(
    dtype: torch.dtype, opened: Checkpoint
) -> None:
    """In bfloat16 too, in which no site of transformers' differs for it alone."""
    ours = Ourselves(opened, dtype)
    capped, uncapped = (outcomes(without_scores(opened, bug, dtype), ours)[CAPS] for bug in (nothing, no_score_cap))
    assert capped.outcome == AGREES and capped.detail.endswith("scores are capped, as the pattern shows")
    assert uncapped.outcome == DIFFERS and uncapped.detail.endswith("scores are not capped, as the pattern shows")


def test_faint_scores_do_not_tell_whether_they_were_capped(tmp_path: Path) -> None:
    def faint(model: Gemma2) -> None:
        for layer in model.model.layers:
            layer.get_submodule("self_attn.q_proj").get_parameter("weight").mul_(1e-3)

    opened = open_checkpoint(written(tmp_path, faint))
    for inject in (nothing, no_score_cap):
        found = outcomes(without_scores(opened, inject, torch.bfloat16), Ourselves(opened, torch.bfloat16))
        assert found[CAPS].outcome == AGREES and "as the pattern" not in found[CAPS].detail


def test_layers_swapped_are_told_from_patterns_where_scores_are_not_shown(ours: Ourselves, opened: Checkpoint) -> None:
    found = outcomes(without_scores(opened, layers_swapped, torch.float32), ours)[LAYERS]
    assert found.outcome == DIFFERS
    assert found.detail == "layer 0 sees beyond the window of 12, and ours is sliding_attention"


def test_a_cap_after_the_mask_is_told_from_patterns_where_scores_are_not_shown(
    ours: Ourselves, opened: Checkpoint
) -> None:
    """Where scores are small it moves no value: what is hidden weighs e^-50."""
    found = outcomes(without_scores(opened, BUGS["cap after mask"].inject, torch.float32), ours)
    assert LAYERS in differing(found) and "sees beyond the window" in found[LAYERS].detail


def test_probabilities_that_round_to_0_are_no_window(tmp_path: Path) -> None:
    """So sharp that in float16 most of what a global layer sees weighs nothing."""

    def sharpen(model: Gemma2) -> None:
        for layer in model.model.layers:
            layer.get_submodule("self_attn.q_proj").get_parameter("weight").mul_(8)

    opened = open_checkpoint(written(tmp_path, sharpen))
    ours = Ourselves(opened, torch.float16)
    seen = ours.run(ROW, ["blocks.1.attn.hook_pattern"])["blocks.1.attn.hook_pattern"]
    assert (seen[:, -1] > 0).any(0).sum() < len(ROW), "else this shows nothing"
    assert outcomes(without_scores(opened, nothing, torch.float16), ours)[LAYERS].outcome == AGREES


def test_a_number_that_configs_state_otherwise_is_a_difference_that_no_value_shows(
    path: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    other = open_reference(f"self:model={written(tmp_path, sliding_window=11)}", path)
    found = judge(other, opened, ROW[:8])
    assert all(row.bitwise for row in found.rows) and found.verdict == DIFFERENCE
    assert [(case.name, case.detail) for case in found.cases if case.outcome == DIFFERS] == [
        (CONFIG, "sliding_window: theirs 11, ours 16")
    ]
    aside = open_reference(f"self:model={written(tmp_path, max_position_embeddings=96)}", path)
    assert judge(aside, opened, ROW[:8]).verdict == EQUAL


def test_float64_is_judged_by_what_float64_leaves(opened: Checkpoint, path: Path) -> None:
    same = open_reference("self", path, torch.float64)
    found = judge(same, opened, ROW[:8])
    assert found.verdict == EQUAL and CACHED not in differing({case.name: case for case in found.cases})

    def halved(model: Gemma2) -> None:
        for paths in ("*.self_attn.q_proj", "*.mlp.down_proj"):
            replaced(model, at(paths, changed(LinearInParts, product=in_halves)))

    assert judge(Injected(opened, halved, torch.float64), opened, ROW[:8]).verdict == ROUNDING
    erf = judge(Injected(opened, BUGS["erf GELU"].inject, torch.float64), opened, ROW[:8])
    assert erf.first == BUGS["erf GELU"].first


def test_a_folder_in_bfloat16_under_llama_cpps_numerics_is_held_against_itself(tmp_path: Path) -> None:
    place = written(tmp_path, lambda model: model.to(torch.bfloat16))
    reference, opened = open_reference("self:numerics=llama.cpp", place), open_checkpoint(place)
    assert (reference.dtype, opened.weights.dtype) == (torch.float32, torch.bfloat16)
    assert judge(reference, opened, ROW[:20], numerics="llama.cpp", cases=False).verdict == EQUAL
    assert judge(reference, opened, ROW[:20], cases=False).verdict == DIFFERENCE
    assert explain(reference, opened, ROW[:20], "llama.cpp")[-1].distance == 0


def test_the_scale_is_held_against_our_config_and_not_against_what_the_system_states(
    ours: Ourselves, path: Path, tmp_path: Path
) -> None:
    other = open_reference(f"self:model={written(tmp_path, query_pre_attn_scalar=18)}", path)
    assert SCALE in differing(outcomes(other, ours))


def test_a_system_that_cannot_do_a_case_says_why_and_is_not_judged_by_it(opened: Checkpoint) -> None:
    found = judge(OneWay(opened), opened, ROW[:10])
    assert {case.name: case.detail for case in found.cases if case.outcome == NOT_RUN} == {
        PROMPT: "its window is compiled in",
        LAYERS: "its window is compiled in",
        SCALE: f"{OneWay(opened).system} does not show queries, keys and scores",
        CACHED: "it has no cache",
        CHUNKED: "it has no cache",
        RAGGED: "it takes one row",
    }
    assert (found.verdict, found.first) == (EQUAL, None)


def test_ids_that_leave_a_fixed_window_are_a_prompt_longer_than_it(ours: Ourselves, opened: Checkpoint) -> None:
    found = outcomes(OneWay(opened), ours)
    assert (found[PROMPT].outcome, found[PROMPT].detail) == (AGREES, "window 16, 48 token ids")
    assert found[LAYERS].outcome == NOT_RUN and "neither scores nor patterns" in found[LAYERS].detail


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
def test_few_ids_are_judged_by_what_they_can_show(length: int, ours: Ourselves, opened: Checkpoint) -> None:
    found = outcomes(Ourselves(opened, torch.float32), ours, ROW[:length])
    assert not differing(found)
    assert (found[PROMPT].outcome == NOT_RUN) == (length < 3)
    assert (found[CACHED].outcome, found[CHUNKED].outcome) == (
        NOT_RUN if length == 1 else AGREES,
        NOT_RUN if length < 8 else AGREES,
    )


def test_ids_that_both_were_given_need_not_begin_with_bos(opened: Checkpoint) -> None:
    found = judge(open_reference("self", opened.path), opened, ROW[1:])
    assert found.cases[0].outcome == NOT_RUN and "both systems were given these token ids" in found.cases[0].detail
    assert found.verdict == EQUAL


def test_the_verdict_is_equal_rounding_or_a_difference(opened: Checkpoint) -> None:
    expected = {
        "self": EQUAL,
        "self:numerics=gemma_pytorch": ROUNDING,
        f"self:dtype=bfloat16,model={opened.path}": EQUAL,
    }
    for spec, verdict in expected.items():
        found = judge(open_reference(spec, opened.path), opened, ROW)
        assert (found.verdict, found.first) == (verdict, None)
        assert len(found.rows) == 2 * 29 + 6 and found.logits is not None and found.logits.positions == 48
    broken = judge(Injected(opened, scaled_by_width), opened, ROW)
    assert (broken.verdict, broken.first) == (DIFFERENCE, "blocks.0.attn.hook_scores_raw")
    fed = judge(SeenPadding(opened, torch.float32), opened, ROW)
    assert (fed.verdict, fed.first) == (DIFFERENCE, None) and all(row.bitwise for row in fed.rows)
    assert judge(SeenPadding(opened, torch.float32), opened, ROW, cases=False).verdict == EQUAL


def test_with_a_profile_what_is_documented_of_a_system_is_equal_to_the_bit(opened: Checkpoint) -> None:
    reference = open_reference("self:dtype=bfloat16,numerics=litgpt", opened.path)
    plain, profiled = (judge(reference, opened, ROW, numerics=name) for name in (None, "litgpt"))
    assert plain.verdict == DIFFERENCE and plain.first == "blocks.0.ln1", "litgpt rounds 1 + w"
    assert profiled.verdict == EQUAL and profiled.numerics == "litgpt"
    assert not any(case.outcome == DIFFERS for case in profiled.cases)


def test_the_sites_asked_for_are_judged_and_no_others(opened: Checkpoint) -> None:
    reference = open_reference("self", opened.path)
    found = judge(reference, opened, ROW, "blocks.*.hook_resid_mid", cases=False)
    assert [row.site for row in found.rows] == ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    assert found.logits is None and found.cases == []
    with pytest.raises(BadModelFile, match="shows none of the sites asked for; it has 1"):
        judge(OneWay(opened), opened, ROW, "hook_embed")


def test_what_is_not_finite_in_their_system_is_named_at_its_first_site(opened: Checkpoint) -> None:
    def inject(model: Gemma2) -> None:
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[0, 0] = torch.nan

    found = judge(Injected(opened, inject), opened, ROW)
    assert (found.verdict, found.first) == (DIFFERENCE, "blocks.1.attn.hook_v")
    (row,) = [row for row in found.rows if row.site == found.first]
    assert row.why == "theirs not finite: nan at [0, 0, 0]"
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_not_finite_in_our_system_is_named_at_its_first_site(tmp_path: Path) -> None:
    """Weights that float16 holds, and what they make of a token that it does not."""
    path = written(tmp_path, lambda model: model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e4))
    opened = open_checkpoint(path)
    narrow, wide = (open_reference("self", path, dtype) for dtype in (torch.float16, torch.float32))
    both = judge(narrow, opened, ROW)
    assert (both.verdict, both.first) == (DIFFERENCE, "blocks.0.mlp.hook_pre_linear")
    assert {"ours", "theirs"} <= {word for row in both.rows for word in row.why.split()}
    wide.dtype = torch.float16  # as a system that computes in float16 and sums in float32
    alone = judge(wide, opened, ROW, cases=False)
    assert alone.first == "blocks.0.mlp.hook_pre_linear"
    assert "ours not finite" in {row.site: row for row in alone.rows}[alone.first].why
    assert not any("theirs" in row.why for row in alone.rows)
    json.dumps(both.to_dict(), allow_nan=False)


def test_more_ids_than_the_context_are_refused(opened: Checkpoint) -> None:
    reference = open_reference("self", opened.path)
    with pytest.raises(ContextOverflow, match="257 token ids exceed the model's context of 256"):
        judge(reference, opened, [BOS] * 257)
    with pytest.raises(ContextOverflow, match="257 token ids exceed the model's context of 256"):
        explain(reference, opened, [BOS] * 257, "jax")


def test_each_change_closes_some_of_the_gap_and_nothing_remains(opened: Checkpoint) -> None:
    reference = open_reference("self:dtype=bfloat16,numerics=gemma_pytorch", opened.path)
    steps = explain(reference, opened, ROW, "gemma_pytorch")
    names = [f"gemma_pytorch {change.name}" for change in PROFILES["gemma_pytorch"]]
    assert [step.change for step in steps] == ["", *names]
    assert steps[0].distance > 0 and steps[-1].distance == 0
    assert sum(step.closed for step in steps) == pytest.approx(1)
    assert steps[-1].bitwise == steps[-1].sites == 2 * 29 + 6 > steps[0].bitwise
    assert all(step.about for step in steps[1:])


def test_the_walk_from_one_profile_to_another_leads_over_ours(opened: Checkpoint) -> None:
    reference = open_reference("self:dtype=bfloat16,numerics=litgpt", opened.path)
    steps = explain(reference, opened, ROW, "litgpt", "gemma_pytorch")
    plain = explain(reference, opened, ROW, "litgpt")
    away = [step for step in steps if step.change.startswith("- gemma_pytorch ")]
    assert steps[0].change == "" and len(steps) == 1 + len(away) + len(plain) - 1
    assert away[-1].distance == plain[0].distance, "all taken away, ours is left"
    assert [step.distance for step in steps[len(away) :]] == [step.distance for step in plain]
    assert steps[-1].distance == 0 < steps[0].distance
    back = explain(reference, opened, ROW, "transformers", "litgpt")
    assert back[0].distance == 0 < back[-1].distance and all(step.closed == 0 for step in back)


def test_a_walk_needs_known_profiles_logits_and_finite_ones(opened: Checkpoint, tmp_path: Path) -> None:
    reference = open_reference("self", opened.path)
    for pair in (("jay", "jax"), ("jax", "jay")):
        with pytest.raises(ValueError, match="numerics 'jay' is not one of transformers, "):
            explain(reference, opened, ROW, *pair)
    reference.sites = frozenset(("hook_embed",))
    with pytest.raises(BadModelFile, match="shows no logits, by which the gap is measured"):
        explain(reference, opened, ROW, "jax")
    path = written(tmp_path, lambda model: model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e4))
    with pytest.raises(NonFiniteError, match="not finite"):
        explain(open_reference("self", path, torch.float16), open_checkpoint(path), ROW, "gemma_pytorch")
