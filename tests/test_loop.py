"""What the loop lets in: one front door, processors, a cache that is continued, another feed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import ContextOverflow, Gemma, HybridCache, NonFiniteError
from gemma2.generate import generate_ids
from gemma2.numerics import PROFILES, with_numerics
from gemma2.research import watching
from gemma2.sampling import Sampling
from tests.conftest import ids, tiny
from tests.test_static import Counting

PROMPT = ids(1, 30)[0].tolist()


def made(model: Any, prompts: list[list[int]] | None = None, steps: int = 20, **options: object) -> list[list[int]]:
    return list(generate_ids(model, prompts or [PROMPT], steps, **options))  # type: ignore[arg-type]


def test_generation_goes_through_the_front_door_and_sites_have_their_shapes() -> None:
    """Hooks on the root fire once a pass; logits are [b t v] there as everywhere."""
    model, shapes = tiny(), list[tuple[int, ...]]()
    hook = model.register_forward_hook(lambda m, inputs, output: shapes.append(tuple(output.shape)))
    seen: dict[str, tuple[int, ...]] = {}
    with watching(model, lambda name, value: seen.__setitem__(name, tuple(value.shape))):
        made(model, [PROMPT, PROMPT[:7]], 3, chunk=20)
    hook.remove()
    assert shapes == [(2, 1, 512)] * 4  # two chunks of the prompt and two tokens; the third is not fed
    assert seen["logits"] == seen["logits_raw"] == (2, 1, 512) and seen["ln_final"] == (2, 1, 288)


@pytest.mark.long
def test_a_compiled_model_is_compiled_in_generation_and_writes_the_same() -> None:
    torch.compiler.reset()
    model, backend = tiny().double(), Counting()
    compiled = torch.compile(model, backend=backend)
    assert made(compiled, steps=40) == made(model, steps=40)
    assert 0 < backend.graphs < 12
    before = backend.graphs
    made(compiled, steps=40)
    assert backend.graphs == before, "nothing new to compile"


@pytest.mark.long
def test_hooks_in_a_compiled_model_fire_while_it_generates() -> None:
    torch.compiler.reset()
    model, fired = tiny(), list[int]()
    compiled = torch.compile(model, backend=Counting())
    plain = made(compiled, steps=4)
    hook = model.model.layers[2].hook_resid_mid.register_forward_hook(lambda m, i, output: fired.append(1))
    assert made(compiled, steps=4) == plain and len(fired) == 4
    hook.remove()
    assert made(compiled, steps=4) == plain and len(fired) == 4


def test_a_wrapper_around_the_model_is_what_is_called() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: gemma2.Gemma2) -> None:
            super().__init__()
            self.module, self.config, self.calls = model, model.config, 0
            self.device = model.device

        def forward(self, *args: object, **named: object) -> Tensor:
            self.calls += 1
            return self.module(*args, **named)

    wrapper = Wrapper(tiny())
    assert made(wrapper, steps=5) == made(wrapper.module, steps=5)
    assert wrapper.calls == 5


def test_processors_see_the_ids_so_far_and_change_what_is_chosen_in_turn() -> None:
    model, told = tiny(), list[Tensor]()

    def only_even(so_far: Tensor, logits: Tensor) -> Tensor:
        told.append(so_far)
        return logits.masked_fill(torch.arange(512) % 2 == 1, -torch.inf)

    def then_seven(so_far: Tensor, logits: Tensor) -> Tensor:
        assert torch.isinf(logits[:, 1::2]).all(), "the first ran first"
        return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    even = [row[0] for row in made(model, steps=6, processors=[only_even])]
    assert all(token % 2 == 0 for token in even)
    assert [so_far.tolist() for so_far in told] == [[PROMPT + even[:n]] for n in range(6)]
    assert made(model, steps=3, processors=[only_even, then_seven]) == [[7]] * 3


def test_banning_ids_is_no_fault_and_banning_all_is_said() -> None:
    def ban_all(so_far: Tensor, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf)

    with pytest.raises(NonFiniteError, match="step 0: every id is banned in row 0"):
        made(tiny(), processors=[ban_all])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="step 0: the logits are not finite in row 0"):
            made(tiny(), processors=[lambda so_far, logits, bad=bad: logits.index_fill(1, torch.tensor([9]), bad)])


@pytest.mark.parametrize("answer", [None, "cut", "flat"])
def test_what_a_processor_returns_is_checked(answer: str | None) -> None:
    answers = {"cut": lambda logits: logits[:, 5:], "flat": lambda logits: logits[0], None: lambda logits: None}
    with pytest.raises(ValueError, match=r"processor 0 must return logits \[1, 512\], not"):
        made(tiny(), processors=[lambda so_far, logits: answers[answer](logits)])


def test_processors_and_rows_are_checked_at_once() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="processors must be a list of functions"):
        generate_ids(model, [PROMPT], 3, processors=lambda ids, logits: logits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the cache holds 2 rows, the tokens have 1"):
        generate_ids(model, [PROMPT], 3, cache=HybridCache(model.config, 2, 100))


def test_sampling_options_without_a_temperature_are_said_to_have_no_effect(pocket: Gemma) -> None:
    with pytest.warns(UserWarning, match="no effect without a temperature, since decoding is greedy: seed, top_p"):
        pocket.generate("And", 1, top_p=0.5, seed=3)


def test_what_a_processor_draws_from_is_seeded_and_the_penalty_comes_first() -> None:
    model = tiny()
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3)
    seen: list[Tensor] = []

    def look(so_far: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits

    runs = [
        made(model, sampling=sampling, generator=torch.Generator().manual_seed(3), processors=processors)
        for processors in ((), (look,))
    ]
    assert runs[0] == runs[1]
    with torch.no_grad():
        plain = model(torch.tensor([PROMPT]))[0, -1]
    penalised = torch.where(plain < 0, plain * 1.3, plain / 1.3)
    assert torch.allclose(seen[0][0, PROMPT], penalised[PROMPT], atol=1e-4)


def test_a_cache_is_continued_as_if_the_whole_had_been_given() -> None:
    model = tiny().double()
    cache = HybridCache(model.config, 1, 100)
    first = made(model, [PROMPT], 10, cache=cache)
    assert cache.length == len(PROMPT) + 9, "the last id is chosen and not fed"
    fed = PROMPT + [row[0] for row in first]
    more = made(model, [[fed[-1], 5, 6]], 10, cache=cache)
    assert more == made(model, [[*fed, 5, 6]], 10)
    with pytest.raises(ContextOverflow, match="the cache has room for 49 more columns; the prompt has 30, and 21"):
        made(model, [PROMPT], 21, cache=cache)


def test_a_batch_continues_its_cache_row_by_row() -> None:
    model = tiny().double()
    prompts = [PROMPT, PROMPT[:11]]
    cache = HybridCache(model.config, 2, 100)
    first = list(zip(*made(model, prompts, 10, cache=cache), strict=True))
    more = made(model, [[row[-1], 5] for row in first], 10, cache=cache)
    whole = made(model, [[*prompt, *row, 5] for prompt, row in zip(prompts, first, strict=True)], 10)
    assert more == whole
    with pytest.raises(ValueError, match="rows that continue a cache must be of equal length"):
        made(model, [[1, 2], [3]], 1, cache=cache)


def test_the_context_counts_what_the_cache_holds() -> None:
    model = tiny(max_position_embeddings=40)
    cache = HybridCache(model.config, 1, 100)
    made(model, [PROMPT], 5, cache=cache)
    with pytest.raises(ContextOverflow, match="prompt of 36 tokens and 5 new ones exceed the context of 40"):
        made(model, [[1, 2]], 5, cache=cache)


def test_a_feed_computes_in_the_models_place() -> None:
    model, told = tiny(), list[tuple[list[int], list[int]]]()

    def feed(tokens: Tensor, positions: Tensor) -> Tensor:
        told.append((tokens[0].tolist(), positions[0].tolist()))
        return torch.nn.functional.one_hot(tokens[:, -1] + 1, 512).float()

    assert made(model, [[3, 4]], 3, feed=feed) == [[5], [6], [7]]
    assert told == [([3, 4], [0, 1]), ([5], [2]), ([6], [3])]


def test_a_text_continues_a_cache_without_another_bos(pocket: Gemma) -> None:
    cache = HybridCache(pocket.config, 1, 60)
    pocket.generate("And God said", 1, cache=cache)
    assert cache.length == len(pocket.tokenizer.encode("And God said"))
    told: list[int] = []
    hook = pocket.model.register_forward_pre_hook(lambda m, inputs: told.extend(inputs[0][0].tolist()))
    pocket.generate(" unto him", 1, cache=cache)
    hook.remove()
    assert told == pocket.tokenizer.encode(" unto him", bos=False)


def test_a_prompt_may_be_a_list_of_ids(pocket: Gemma) -> None:
    text = "And God said"
    assert pocket.generate([pocket.tokenizer.encode(text), text], 12) == [pocket.generate(text, 12)] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_numerics_profile_generates_with_its_cache(profile: str, dtype: str) -> None:
    """llama.cpp's stream is float32 over bfloat16 weights: the cache takes the keys' dtype."""
    gemma = gemma2.load(dtype=dtype, numerics=profile, device="cpu")
    text = "And God said"
    written = gemma.generate(text, 3)
    tokens = torch.tensor([gemma.tokenizer.encode(text)])
    with torch.no_grad():
        best = int(gemma.model(tokens)[0, -1].argmax())
    assert len(written) > 0 and written.startswith(gemma.tokenizer.decode([best]))


@pytest.mark.parametrize(
    "profile", [name for name in PROFILES if name != "llama.cpp"]
)  # which has other sums for one row
def test_a_profile_decodes_what_it_computes_in_one_pass(profile: str) -> None:
    model = with_numerics(tiny(), profile)
    written = [row[0] for row in made(model, steps=30)]
    with torch.no_grad():
        again = model(torch.tensor([PROMPT + written]))[0, len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert again == written


@pytest.mark.parametrize("length", [0, 1])
def test_recording_a_generation_gives_one_entry_a_pass(length: int) -> None:
    """By a hook on any site, with `hook_resid_post` of the prompt's chunks first."""
    model, entries = tiny(), list[int]()
    with watching(model, lambda name, value: entries.append(value.shape[1]), "blocks.2.hook_resid_post"):
        made(model, steps=4 + length, chunk=20)
    assert entries == [20, 10] + [1] * (3 + length)
