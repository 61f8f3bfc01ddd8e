"""The loop: greedy is the argmax, batches equal solo runs, streams equal wholes, and every row stops on its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gemma2
from gemma2.detokenizer import Detokenizer
from gemma2.gemma import Options
from gemma2.generate import generate_ids
from gemma2.sampling import Sampling
from tests.conftest import ids, tiny

PROMPTS = ["In the beginning", "And the king said unto", "ROMEO:\n", "", "Thou shalt not"]


def continuation(model: gemma2.Gemma2, prompts: list[list[int]], n: int, **options: object) -> list[list[int]]:
    steps = list(generate_ids(model, prompts, n, **options))  # type: ignore[arg-type]
    return [list(row) for row in zip(*steps, strict=True)]


@torch.no_grad()
def test_greedy_decoding_is_the_argmax_of_uncached_passes() -> None:
    model = tiny().double()
    prompt = ids(1, 30)[0].tolist()
    written = continuation(model, [prompt], 40)[0]
    expected = list(prompt)
    for _ in range(40):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert written == expected[30:]


@torch.no_grad()
def test_feeding_a_greedy_generation_back_gives_the_log_probabilities_it_was_made_with(pocket: gemma2.Gemma) -> None:
    """200 tokens past the pocket's window of 128: the loop's cached logits against one uncached pass."""
    prompt = pocket.tokenizer.encode("And it came to pass")
    made: list[Tensor] = []
    hook = pocket.model.softcap.register_forward_hook(lambda m, i, output: made.append(output[0, -1].log_softmax(-1)))
    written = continuation(pocket.model, [prompt], 200)[0]
    hook.remove()
    again = pocket.model(torch.tensor([prompt + written]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
    loop = torch.stack(made)
    chosen = torch.tensor(written)[:, None]
    assert (loop.gather(1, chosen) - again.gather(1, chosen)).abs().max() < 1e-4
    assert torch.equal(again.argmax(-1), chosen[:, 0])


STEPS = 24  # past the window of 16


@pytest.mark.parametrize("rows", [2, 3, 8])
@torch.no_grad()
def test_rows_of_a_ragged_batch_equal_solo_runs_token_for_token(rows: int) -> None:
    model = tiny("9b")
    differing = 0
    for seed in range(3):
        prompts = [ids(1, 3 + 7 * row, seed=seed * 10 + row)[0].tolist() for row in range(rows)]
        logits: list[Tensor] = []
        hook = model.softcap.register_forward_hook(lambda m, i, output, logits=logits: logits.append(output))
        together = continuation(model, prompts, STEPS)
        hook.remove()
        batched = torch.stack(logits, dim=1)  # [b n v]
        for row, prompt in enumerate(prompts):
            solo: list[Tensor] = []
            hook = model.softcap.register_forward_hook(lambda m, i, output, solo=solo: solo.append(output[0]))
            alone = continuation(model, [prompt], STEPS)[0]
            hook.remove()
            same = next((i for i, (a, b) in enumerate(zip(alone, together[row], strict=True)) if a != b), STEPS)
            upto = slice(0, min(same + 1, STEPS))
            apart = (torch.stack(solo)[upto] - batched[row, upto]).abs().max()
            assert apart <= 1e-5 * 30
            if same < STEPS:
                differing += 1
                top = torch.stack(solo)[same].topk(2).values
                assert (top[..., 0] - top[..., 1]).max() < 1e-4, (
                    f"row {row} of {rows} differs at {same} by more than a tie"
                )
    assert differing <= 3 * rows // 4, "ties are rare"


@torch.no_grad()
def test_a_finished_row_does_not_disturb_the_others() -> None:
    model, finished = tiny("9b").double(), set[int]()
    prompts = [ids(1, 9, seed=1)[0].tolist(), ids(1, 25, seed=2)[0].tolist()]
    alone = continuation(model, [prompts[1]], 40)[0]
    together = []
    for step, row in enumerate(generate_ids(model, prompts, 40, finished=finished)):
        together.append(row[1])
        if step == 3:
            finished.add(0)
    assert together == alone


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 512])
@torch.no_grad()
@pytest.mark.long
def test_the_chunk_of_the_prefill_does_not_matter(chunk: int) -> None:
    model = tiny().double()
    prompts = [ids(1, 50)[0].tolist(), ids(1, 21, seed=4)[0].tolist()]
    assert continuation(model, prompts, 20, chunk=chunk) == continuation(model, prompts, 20, chunk=50)


@torch.no_grad()
def test_the_head_is_computed_for_the_last_position_only() -> None:
    model, shapes = tiny(), []
    hook = model.lm_head.register_forward_hook(lambda m, inputs, output: shapes.append(tuple(output.shape)))
    continuation(model, [ids(1, 50)[0].tolist()], 3, chunk=20)
    hook.remove()
    assert shapes == [(1, 1, 512)] * 5


def test_a_list_gives_a_list_and_equals_the_single_prompts(pocket: gemma2.Gemma) -> None:
    together = pocket.generate(PROMPTS, max_new_tokens=24)
    assert isinstance(together, list) and len(together) == len(PROMPTS)
    assert together == [pocket.generate(prompt, max_new_tokens=24) for prompt in PROMPTS]


def test_a_stream_is_the_whole_in_pieces(pocket: gemma2.Gemma) -> None:
    settings: list[Options] = [{}, {"temperature": 1.2, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "seed": 4}]
    for options in settings:
        pieces = list(pocket.stream(PROMPTS[0], 60, **options))
        assert len(pieces) > 20 and all(pieces)
        assert "".join(pieces) == pocket.generate(PROMPTS[0], 60, **options)
    written = continuation(pocket.model, [pocket.tokenizer.encode(PROMPTS[0])], 60)[0]
    end = next((i for i, token in enumerate(written) if token in pocket.stop_ids), 60)
    assert "".join(pocket.stream(PROMPTS[0], 60)) == pocket.tokenizer.decode(written[:end])


def test_control_tokens_in_a_prompt_are_text_unless_asked_for(pocket: gemma2.Gemma) -> None:
    seen: list[Tensor] = []
    hook = pocket.model.model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    for special in (False, True):
        pocket.generate("<start_of_turn>user", 1, special=special)
    hook.remove()
    assert [106 in tokens for tokens in seen] == [False, True]


def test_the_same_seed_writes_the_same_text_and_another_does_not(pocket: gemma2.Gemma) -> None:
    texts = [pocket.generate(PROMPTS[1], 40, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


DETERMINISM = """
import hashlib, gemma2
gemma = gemma2.load(dtype="float32", device="cpu")
digest = hashlib.sha256()
gemma.model.softcap.register_forward_hook(lambda m, i, output: digest.update(output.numpy().tobytes()))
for seed in range(3):
    print(repr(gemma.generate("And the", 64, temperature=1.0, top_p=0.95, seed=seed)), digest.hexdigest())
"""


@pytest.mark.long
def test_three_seeds_give_the_same_logits_and_text_in_two_processes() -> None:
    """Bit-equal logits: their bytes run into the digest printed behind every text."""
    runs = [subprocess.run([sys.executable, "-c", DETERMINISM], capture_output=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and len(set(runs[0].stdout.splitlines())) == 3


def test_an_empty_prompt_continues_from_the_bos(pocket: gemma2.Gemma) -> None:
    expected = continuation(pocket.model, [[2]], 8)[0]
    assert pocket.generate("", 8) == pocket.tokenizer.decode(expected)


def test_zero_new_tokens_give_the_empty_text(pocket: gemma2.Gemma) -> None:
    assert pocket.generate("x", 0) == "" and list(pocket.stream("x", 0)) == []


def test_a_stop_string_ends_a_row_and_is_not_part_of_it(pocket: gemma2.Gemma) -> None:
    whole = pocket.generate(PROMPTS[:2], 60)
    middle = whole[0][20:26]  # spans pieces
    stopped = pocket.generate(PROMPTS[:2], 60, stop=[middle, "never written"])
    assert stopped[0] == whole[0][: whole[0].index(middle)]
    assert stopped[1] == (whole[1].split(middle)[0])
    assert "".join(pocket.stream(PROMPTS[0], 60, stop=middle)) == stopped[0]


def test_text_held_back_for_a_stop_string_comes_out_when_it_does_not(pocket: gemma2.Gemma) -> None:
    whole = pocket.generate(PROMPTS[0], 30)
    assert pocket.generate(PROMPTS[0], 30, stop=whole[-3:] + "\0") == whole


def test_eos_and_end_of_turn_end_a_row(pocket: gemma2.Gemma) -> None:
    assert pocket.stop_ids == {1, 107}
    for stop in pocket.stop_ids:
        reply = Detokenizer(pocket.tokenizer, pocket.stop_ids, ())
        assert reply.push(pocket.tokenizer.encode("a", bos=False)[0]) == "a"
        assert reply.push(stop) == "" and reply.finish_reason == "stop"


def test_pieces_join_to_the_decoded_text_also_inside_multi_byte_characters(pocket: gemma2.Gemma) -> None:
    """Characters the pocket vocabulary lacks are spelled in bytes; half of one must never be shown."""
    text = "naïve 日本語 🙂 \n\n  é\u0301"
    tokens = pocket.tokenizer.encode(text, bos=False)
    reply = Detokenizer(pocket.tokenizer, frozenset(), ())
    pieces = [reply.push(token) for token in tokens]
    assert "".join(pieces) + reply.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    broken = [*tokens[:3], 217 + 0xE6, 217 + 0x97, *tokens[3:], 217 + 0xF0, 217 + 0x9F]
    reply = Detokenizer(pocket.tokenizer, frozenset(), ())
    pieces = [reply.push(token) for token in broken]
    assert "".join(pieces) + reply.flush() == pocket.tokenizer.decode(broken)


def test_a_prompt_and_new_tokens_beyond_the_context_are_refused_before_computing(pocket: gemma2.Gemma) -> None:
    calls: list[int] = []
    hook = pocket.model.model.register_forward_pre_hook(lambda m, inputs: calls.append(1))
    with pytest.raises(gemma2.ContextOverflow, match="prompt of 3 tokens and 1022 new ones exceed the context of 1024"):
        pocket.stream("the king", 1022)
    hook.remove()
    assert not calls


def test_logits_that_are_not_finite_stop_with_an_error_that_says_where() -> None:
    model = tiny()
    steps: Iterator[list[int]] = generate_ids(model, [[2, 5], [2, 7]], 10)
    list(islice(steps, 3))

    def poison(module: object, inputs: object, output: Tensor) -> Tensor:
        output[1, -1, 7] = torch.nan
        return output

    hook = model.softcap.register_forward_hook(poison)
    with pytest.raises(gemma2.NonFiniteError, match="step 3: the logits are not finite in row 1"):
        next(steps)
    hook.remove()


def test_closing_a_stream_leaves_the_model_as_it_was(pocket: gemma2.Gemma) -> None:
    whole = pocket.generate(PROMPTS[0], 20)
    stream = pocket.stream(PROMPTS[0], 20)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()
    assert pocket.generate(PROMPTS[0], 20) == whole


def test_gradients_stay_enabled_for_the_caller_between_pieces(pocket: gemma2.Gemma) -> None:
    for _ in islice(pocket.stream(PROMPTS[0], 5), 2):
        assert torch.is_grad_enabled()


def test_stats_count_what_was_done(pocket: gemma2.Gemma) -> None:
    stats = gemma2.Stats()
    pocket.generate(["the king", "In the beginning God"], 10, stats=stats)
    assert stats.prompt_tokens == sum(
        len(pocket.tokenizer.encode(text)) for text in ("the king", "In the beginning God")
    )
    assert (stats.new_tokens, stats.decoded_tokens, stats.finish_reasons) == (20, 18, ["length", "length"])
    pocket.generate("the king", 3, stats=stats, stop=" ")
    assert stats.new_tokens <= 3 and stats.finish_reasons == ["stop"]
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ""}, "stop string"),
        ({"stop": ["a", ""]}, "stop string"),
        ({"top_p": -0.1}, "top_p"),
    ],
)
def test_arguments_are_checked_at_once_not_at_the_first_piece(
    pocket: gemma2.Gemma, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pocket.stream("x", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[512]], [[-1]], [[1.0]], [[True]]])
def test_prompts_of_ids_that_are_none_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="id"):
        generate_ids(tiny(), prompts, 3)


def test_a_repetition_penalty_makes_greedy_text_repeat_less(pocket: gemma2.Gemma) -> None:
    def repeats(penalty: float) -> int:
        prompt = pocket.tokenizer.encode("And the")
        written = continuation(pocket.model, [prompt], 80, sampling=Sampling(repetition_penalty=penalty))[0]
        return len(written) - len(set(written))

    assert repeats(1.3) < repeats(1.0)


def test_options_that_are_none_are_not_set_and_numbers_of_numpy_and_pytorch_are_taken(
    pocket: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """`pocket` is Any, since to a type checker these numbers are no int and no float."""
    plain = pocket.generate("In the beginning", 12)
    unset = {"stop": None, "top_p": None, "top_k": None, "min_p": None, "temperature": None, "processors": None}
    off = {"top_k": -1, "seed": -1, "top_p": np.float64(1.0), "min_p": torch.tensor(0.0)}
    assert pocket.generate("In the beginning", np.int64(12), **unset) == plain
    assert pocket.generate("In the beginning", torch.tensor(12), **off) == plain
    assert not recwarn.list, "nothing of this is an option that has no effect"
    drawn = pocket.generate("In the beginning", 12, temperature=np.float32(0.9), seed=np.int64(3), top_k=np.int64(40))
    assert drawn == pocket.generate("In the beginning", 12, temperature=float(np.float32(0.9)), seed=3, top_k=40)
    assert pocket.generate("In the beginning", 12, temperature=1.0, top_p=0) == plain
