"""Arguments that cannot be: the exact error, words and exit code, before weights are read or anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import gemma2
from gemma2 import BadModelFile, ContextOverflow, Gemma, NonFiniteError, Sampling
from gemma2.checkpoints.hf_config import published_config
from gemma2.checkpoints.safetensors import SINGLE
from gemma2.cli import main
from gemma2.generate import generate_ids
from gemma2.sampling import repetition_penalty, sample
from tests.conftest import tensors_of, tiny
from tests.hostile.conftest import SMALL, Complaint, shell

nan, inf = math.nan, math.inf
NARROW = "float16 is too narrow for Gemma 2 (it holds nothing beyond 65,504"
SURROGATE = "text is not valid UTF-8: lone surrogate at character"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which no file can be read: whoever looks into it exits with 1."""
    place = tmp_path_factory.mktemp("broken")
    for name in ("config.json", "tokenizer.model", SINGLE):
        (place / name).write_bytes(b"\xff")
    return place


# The command line. All of these exit with 2.

ARGUMENTS: list[tuple[list[str], str]] = [
    ([], "the following arguments are required: COMMAND"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
    (["generate"], "the following arguments are required: PROMPT"),
    (["generate", "x", "y"], "unrecognized arguments: y"),
    (["generate", "x", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["generate", "x", "-n"], "-n/--max-new-tokens: expected one argument"),
    (["generate", "x", "-n", "1.5"], "-n/--max-new-tokens: invalid int value: '1.5'"),
    (["generate", "x", "-n", "many"], "-n/--max-new-tokens: invalid int value: 'many'"),
    (["generate", "x", "-n", ""], "-n/--max-new-tokens: invalid int value: ''"),
    (["generate", "x", "-n", "-1"], "max_new_tokens must be a non-negative integer, not -1"),
    (["generate", "x", "-n", str(2**63)], "max_new_tokens must be a non-negative integer, not 9223372036854775808"),
    (["generate", "x", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
    (["generate", "x", "--temperature", "-0.1"], "temperature must be a number in [0, 1e30], not -0.1"),
    (["generate", "x", "--temperature", "nan"], "temperature must be a number in [0, 1e30], not nan"),
    (["generate", "x", "--temperature", "inf"], "temperature must be a number in [0, 1e30], not inf"),
    (["generate", "x", "--temperature=-inf"], "temperature must be a number in [0, 1e30], not -inf"),
    (["generate", "x", "--temperature", "1e400"], "temperature must be a number in [0, 1e30], not inf"),
    (["generate", "x", "--top-p", "-0.1"], "top_p must be a number in [0, 1], not -0.1"),
    (["generate", "x", "--top-p", "1.1"], "top_p must be a number in [0, 1], not 1.1"),
    (["generate", "x", "--top-p", "nan"], "top_p must be a number in [0, 1], not nan"),
    (["generate", "x", "--top-k", "-2"], "top_k must be a non-negative integer, not -2"),
    (["generate", "x", "--top-k", "1.5"], "--top-k: invalid int value: '1.5'"),
    (["generate", "x", "--top-k", str(2**63)], "top_k must be a non-negative integer"),
    (["generate", "x", "--min-p", "-0.1"], "min_p must be a number in [0, 1], not -0.1"),
    (["generate", "x", "--min-p", "nan"], "min_p must be a number in [0, 1], not nan"),
    (["generate", "x", "--repetition-penalty", "0"], "repetition_penalty must be a number in [1e-30, 1e30], not 0.0"),
    (["generate", "x", "--repetition-penalty", "-2"], "repetition_penalty must be a number in [1e-30, 1e30], not -2.0"),
    (["generate", "x", "--seed", "-2"], "seed must be a non-negative integer, not -2"),
    (["generate", "x", "--seed", "1.0"], "--seed: invalid int value: '1.0'"),
    (["generate", "x", "--seed", str(2**63)], "seed must be a non-negative integer, not 9223372036854775808"),
    (["generate", "x", "--stop", ""], "a stop string must not be empty"),
    (["generate", "x", "--stop", "a", "--stop", ""], "a stop string must not be empty"),
    (["generate", "x", "--stop", "a\udcff"], f"{SURROGATE} 1"),
    (["generate", "\udcff"], f"{SURROGATE} 0"),
    (["generate", "caf\udce9 x"], f"{SURROGATE} 3"),
    (["generate", "x", "--dtype", "int8"], "dtype 'int8' is not one of float32, bfloat16, float64, float16"),
    (["generate", "x", "--dtype", "fp32"], "dtype 'fp32' is not one of"),
    (["generate", "x", "--dtype", ""], "dtype '' is not one of"),
    (["generate", "x", "--dtype", "float16"], NARROW),
    (["generate", "x", "--dtype", "torch.float16"], NARROW),
    (["generate", "x", "--device", "abacus"], "device 'abacus' is not available here"),
    (["generate", "x", "--device", "cuda:99"], "device 'cuda:99' is not available here"),
    (["generate", "x", "--device", "hpu"], "device 'hpu' is not available here"),
    (["generate", "x", "--device", "cpu:-1"], "device 'cpu:-1' is not available here"),
    (["generate", "x", "--device", ""], "device '' is not available here"),
    (["generate", "x", "--device", "meta"], "device 'meta' holds no values"),
    (["chat", "hello"], "unrecognized arguments: hello"),
    (["chat", "-n", "-1"], "max_new_tokens must be a non-negative integer, not -1"),
    (["chat", "--temperature", "nan"], "temperature must be a number in [0, 1e30], not nan"),
    (["chat", "--dtype", "float16"], NARROW),
    (["chat", "--stop", ""], "a stop string must not be empty"),
    (["chat", "--seed", "x"], "--seed: invalid int value: 'x'"),
]


@pytest.mark.parametrize(("argv", "words"), ARGUMENTS, ids=[ascii(" ".join(argv))[1:-1] for argv, _ in ARGUMENTS])
def test_bad_arguments_exit_with_2_before_the_model_is_looked_at(
    argv: list[str], words: str, broken: Path, complaint: Complaint
) -> None:
    assert words in complaint(*argv, *(["--model", broken] if argv else []), code=2)


def test_the_model_these_arguments_were_given_with_exits_with_1(broken: Path, complaint: Complaint) -> None:
    assert "config.json: not valid JSON" in complaint("generate", "x", "--model", broken, code=1)
    assert "config.json: not valid JSON" in complaint("chat", "--model", broken, code=1)
    forced = ("--dtype", "float16", "--force-float16")
    assert "config.json: not valid JSON" in complaint("generate", "x", "--model", broken, *forced, code=1)


def test_failed_runs_exit_with_1(
    tmp_path: Path, broken: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*argv: object) -> str:
        return complaint("generate", *argv, code=1)

    assert "prompt of 2 tokens and 1023 new ones exceed the context of 1024" in run("x", "-n", 1023)
    assert "exceed the context of 1024" in run("word " * 1200)
    assert "no such file or folder" in run("x", "--model", tmp_path / "absent" / "model.ckpt")
    assert "no such file or folder, nor a hub name" in run("x", "--model", "absent/\udcff")
    assert "no such file or folder, nor a hub name" in run("x", "--model", "a\0b")
    assert "no config.json" in run("x", "--model", tmp_path)
    finite = tensors_of(tiny(vocab_size=4096, **SMALL))
    finite["model.norm.weight"] = torch.full((8,), 3e38)  # the head's sums are infinity minus infinity
    save_file(finite, shell(tmp_path / "overflow") / SINGLE)
    assert "step 0: the logits are not finite in row 0" in run("x", "--model", tmp_path / "overflow", "--device", "cpu")

    def crash(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("gemma2.cli.options.load", crash)
    assert "error: MemoryError" in run("x")


def test_an_error_keeps_its_traceback_for_who_asks(broken: Path) -> None:
    with pytest.raises(BadModelFile, match=r"config\.json: not valid JSON"):
        main(["generate", "x", "--model", str(broken), "--debug"])
    with pytest.raises(ValueError, match="top_p"):
        main(["generate", "x", "--top-p", "2", "--debug"])


def test_an_empty_prompt_generates_from_the_bos(pocket: Gemma, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "", "-n", "5", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    steps = generate_ids(pocket.model, [[pocket.tokenizer.special["bos"]]], 5)
    assert said == pocket.tokenizer.decode([token for (token,) in steps]) + "\n"


# Python. Whatever is refused is refused while the model cannot compute.

Call = Callable[[Any], object]  # of a `Gemma`, whose types these calls are meant to break
CONTENT = [{"role": "user", "content": "hi"}]
CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    # how many
    "-1 tokens": (lambda g: g.generate("x", -1), ValueError, "max_new_tokens must be a non-negative integer, not -1"),
    "1.5 tokens": (lambda g: g.stream("x", 1.5), ValueError, "max_new_tokens must be a non-negative integer, not 1.5"),
    "None tokens": (lambda g: g.stream("x", None), ValueError, "max_new_tokens must be a non-negative integer"),
    "True tokens": (lambda g: g.chat(CONTENT, True), ValueError, "max_new_tokens must be a non-negative integer"),
    "'4' tokens": (lambda g: g.stream_chat(CONTENT, "4"), ValueError, "max_new_tokens must be a non-neg"),
    "NaN tokens": (lambda g: generate_ids(g.model, [[2]], nan), ValueError, "max_new_tokens must be"),  # type: ignore[arg-type]
    "2^63 tokens": (lambda g: generate_ids(g.model, [[2]], 2**63), ValueError, "max_new_tokens must be"),
    # how far
    "new beyond": (lambda g: g.stream("x", 1023), ContextOverflow, "prompt of 2 tokens and 1023 new ones exceed"),
    "prompt beyond": (lambda g: g.generate("word " * 1200, 1), ContextOverflow, "exceed the context of 1024"),
    "one row beyond": (lambda g: g.generate(["a", "word " * 1200], 1), ContextOverflow, "exceed the context of 1024"),
    "no new, prompt beyond": (lambda g: generate_ids(g.model, [[2] * 1025], 0), ContextOverflow, "prompt of 1025"),
    "chat beyond": (lambda g: g.stream_chat(CONTENT, 1020), ContextOverflow, "exceed the context of 1024"),
    # how chosen; the rest of this in the table below
    "temperature": (lambda g: g.stream("x", temperature=nan), ValueError, r"temperature must be a number in [0, 1e30]"),
    "top_p": (lambda g: g.generate("x", top_p=2), ValueError, "top_p must be a number in [0, 1], not 2"),
    "top_k": (lambda g: g.chat(CONTENT, top_k=1.5), ValueError, "top_k must be a non-negative integer, not 1.5"),
    "min_p": (lambda g: g.stream_chat(CONTENT, min_p=2), ValueError, "min_p must be a number in [0, 1], not 2"),
    "penalty": (lambda g: g.stream("x", repetition_penalty=0), ValueError, "repetition_penalty must be a number in"),
    "temperature of 400 digits": (lambda g: Sampling(temperature=10**400), ValueError, "temperature must be a number"),
    "penalty of 400 digits": (lambda g: Sampling(repetition_penalty=10**400), ValueError, "repetition_penalty must"),
    "a tensor": (lambda g: Sampling(top_p=torch.ones(1)), ValueError, "top_p must be a number"),  # type: ignore[arg-type]
    "seed -2": (lambda g: g.stream("x", seed=-2), ValueError, "seed must be a non-negative integer, not -2"),
    "seed 1.5": (lambda g: g.stream("x", seed=1.5), ValueError, "seed must be a non-negative integer"),
    "seed '1'": (lambda g: g.stream("x", seed="1"), ValueError, "seed must be a non-negative integer"),
    "seed True": (lambda g: g.stream("x", seed=True), ValueError, "seed must be a non-negative integer"),
    "seed NaN": (lambda g: g.stream("x", seed=nan), ValueError, "seed must be a non-negative integer"),
    "seed 2^63": (lambda g: g.stream("x", seed=2**63), ValueError, "seed must be a non-negative integer"),
    # where it stops
    "stop empty": (lambda g: g.stream("x", stop=""), ValueError, "a stop string must not be empty"),
    "one stop empty": (lambda g: g.chat(CONTENT, stop=["a", ""]), ValueError, "a stop string must not be empty"),
    "stop a number": (lambda g: g.stream("x", stop=[5]), ValueError, "text must be a string, not int"),
    "stop bytes": (lambda g: g.stream("x", stop=[b"a"]), ValueError, "text must be a string, not bytes"),
    "stop not UTF-8": (lambda g: g.stream("x", stop=["\udcff"]), ValueError, f"{SURROGATE} 0"),
    # text
    "no prompts": (lambda g: g.generate([]), ValueError, "there is no prompt: give a text, or a list with at least"),
    "prompts None": (lambda g: g.generate(None), ValueError, "prompts must be a text or a list of texts, not NoneType"),
    "prompts 5": (lambda g: g.generate(5), ValueError, "prompts must be a text or a list of texts, not int"),
    "prompt None": (
        lambda g: g.generate([None]),
        ValueError,
        "a prompt must be a text or a list of token ids, not None",
    ),
    "prompt bytes": (lambda g: g.stream(b"x"), ValueError, "must be a text or a list of token ids, not b'x'"),
    "prompt 5": (lambda g: g.stream(5), ValueError, "a prompt must be a text or a list of token ids, not 5"),
    "option foo": (
        lambda g: g.generate("x", foo=3),
        TypeError,
        "generation has no option 'foo': there are temp",
    ),
    "option do_sample": (lambda g: g.chat(CONTENT, do_sample=True), TypeError, "temperature above 0 samples"),
    "stop 5": (lambda g: g.stream("x", stop=5), ValueError, "stop must be a string or several, not int"),
    "tokens a list": (lambda g: g.model([[2, 5]]), ValueError, "tokens must be a tensor [batch, length], not list"),
    "last 0": (lambda g: g.model(torch.ones(1, 2).long(), last=0), ValueError, "last must be from 1 to 2"),
    "last 3": (lambda g: g.model(torch.ones(1, 2).long(), last=3), ValueError, "last must be from 1 to 2"),
    "window 0": (
        lambda g: dataclasses.replace(g.config, sliding_window=0),
        ValueError,
        "sliding_window must be a positive integer",
    ),
    "published pocket": (lambda g: published_config("pocket"), ValueError, "no published config 'pocket'"),
    "prompt not UTF-8": (lambda g: g.stream("a\ud800"), ValueError, f"{SURROGATE} 1"),
    "one prompt not UTF-8": (lambda g: g.generate(["x", "\udcff"]), ValueError, f"{SURROGATE} 0"),
    "encode None": (lambda g: g.tokenizer.encode(None), ValueError, "text must be a string, not NoneType"),
    # turns
    "no turns": (lambda g: g.chat([]), ValueError, "the last message must be the user's"),
    "system": (lambda g: g.chat([{"role": "system", "content": "x"}]), ValueError, "Gemma 2 has no system role"),
    "tool": (lambda g: g.chat([{"role": "tool", "content": "x"}]), ValueError, "has role 'tool'; there are user and"),
    "model first": (lambda g: g.chat([{"role": "model", "content": "x"}]), ValueError, "must alternate, user first"),
    "user twice": (lambda g: g.stream_chat(CONTENT * 2), ValueError, "must alternate, user first"),
    "no content": (lambda g: g.chat([{"role": "user"}]), ValueError, "message 0 has no content"),
    "a string for a turn": (lambda g: g.chat(["hi"]), ValueError, "message 0 must be a dict with 'role' and 'content'"),
    "content 5": (lambda g: g.chat([{"role": "user", "content": 5}]), ValueError, "text must be a string"),
    "content not UTF-8": (lambda g: g.chat([{"role": "user", "content": "\ud800"}]), ValueError, f"{SURROGATE} 0"),
    # ids
    "no rows": (lambda g: generate_ids(g.model, [], 1), ValueError, "nothing to continue"),
    "empty row": (lambda g: generate_ids(g.model, [[2], []], 1), ValueError, "nothing to continue"),
    "row of no list": (lambda g: generate_ids(g.model, [2], 1), ValueError, "token ids must be a sequence"),  # type: ignore[list-item]
    "decode 5": (lambda g: g.tokenizer.decode(5), ValueError, "token ids must be a sequence of integers, not 5"),
    "decode None": (lambda g: g.tokenizer.decode(None), ValueError, "token ids must be a sequence"),
    "decode a 0-d tensor": (lambda g: g.tokenizer.decode(torch.tensor(5)), ValueError, "token ids must be a sequence"),
    "decode a matrix": (lambda g: g.tokenizer.decode(torch.ones(1, 2).long()), ValueError, "token id [1, 1] at 0"),
    "decode text": (lambda g: g.tokenizer.decode("12"), ValueError, "token ids must be a sequence"),
    "float tensor": (lambda g: g.model(torch.ones(1, 2)), ValueError, "token ids must be int64 or int32"),
    "bool tensor": (lambda g: g.model(torch.ones(1, 2).bool()), ValueError, "token ids must be int64 or int32"),
    "row tensor": (lambda g: g.model(torch.ones(2).long()), ValueError, "must be a non-empty matrix [batch, length]"),
    "empty tensor": (lambda g: g.model(torch.ones(1, 0).long()), ValueError, "must be a non-empty matrix"),
    "id too large": (lambda g: g.model(torch.tensor([[0, 4096]])), ValueError, "token id 4096 at [0, 1] is outside"),
    "id negative": (lambda g: g.model(torch.tensor([[-1]])), ValueError, "token id -1 at [0, 0] is outside"),
    # loading
    "dtype int8": (lambda g: gemma2.load(dtype="int8"), ValueError, "dtype 'int8' is not one of"),
    "dtype torch.int8": (lambda g: gemma2.load(dtype=torch.int8), ValueError, "dtype 'torch.int8' is not one of"),
    "dtype 16": (lambda g: gemma2.load(dtype=16), ValueError, "dtype '16' is not one of"),  # type: ignore[arg-type]
    "dtype float16": (lambda g: gemma2.load(dtype="float16"), ValueError, NARROW),
    "dtype torch.float16": (lambda g: gemma2.load(dtype=torch.float16), ValueError, NARROW),
    "device": (lambda g: gemma2.load(device="abacus"), ValueError, "device 'abacus' is not available here"),
    "device 1.5": (lambda g: gemma2.load(device=1.5), ValueError, "device '1.5' is not available"),  # type: ignore[arg-type]
    "device meta": (lambda g: gemma2.load(device=torch.device("meta")), ValueError, "device 'meta' holds no values"),
    "tokenizer": (lambda g: gemma2.load(tokenizer="absent/x.model"), BadModelFile, "absent/x.model: no such file"),
    "model": (lambda g: gemma2.load("absent/x.ckpt"), BadModelFile, "absent/x.ckpt: no such file or folder"),
    "size": (lambda g: published_config("gemma-2-3b"), ValueError, "no published config 'gemma-2-3b'"),
    "cache of nothing": (lambda g: gemma2.HybridCache(g.config, 0, 1), ValueError, "needs at least one row"),
}


def with_id(odd: object) -> dict[str, tuple[Call, type[Exception], str]]:
    words = f"token id {odd!r} at 1 is not an integer in [0, 4096)"
    return {
        f"generate id {odd}": (lambda g: generate_ids(g.model, [[2, odd]], 1), ValueError, words),  # type: ignore[list-item]
        f"decode id {odd}": (lambda g: g.tokenizer.decode([2, odd]), ValueError, words),
    }


for odd in (-1, 4096, 2**70, 1.0, nan, True, None, "a", [3]):
    CALLS |= with_id(odd)


@pytest.fixture
def idle(pocket: Gemma, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gemma]:
    """The pocket model, which fails when it is asked to compute."""

    def explode(*_: object, **__: object) -> None:
        raise AssertionError("computed before the arguments were checked")

    monkeypatch.setattr(pocket.model.model.layers[0], "forward", explode)
    yield pocket


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.filterwarnings("ignore:this checkpoint does not say")
def test_bad_arguments_raise_the_documented_error_before_anything_is_computed(case: str, idle: Gemma) -> None:
    call, kind, words = CALLS[case]
    with pytest.raises(kind) as caught:
        call(idle)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_finite_while_generating_is_an_error_of_its_own(pocket: Gemma) -> None:
    with torch.no_grad():
        model = tiny(vocab_size=4096, **SMALL)
        model.model.norm.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="step 0: the logits are not finite in row 0; generation stops here"):
        Gemma(model, pocket.tokenizer).generate("x", 3)


# Each sampling parameter against each odd value: what is taken, and what it then does.

VALUES: dict[str, Any] = {label: float(label) for label in ("-0.0", "1e-40", "1e-6", "1.0001", "inf", "nan")}
VALUES |= {"-1": -1, "0": 0, "1": 1, "2": 2, "text": "1", "None": None, "True": True}
TAKEN = {
    "temperature": ["None", "-0.0", "0", "1e-40", "1e-6", "1", "1.0001", "2"],
    "top_k": ["None", "-1", "0", "1", "2"],
    "top_p": ["None", "-0.0", "0", "1e-40", "1e-6", "1"],
    "min_p": ["None", "-0.0", "0", "1e-40", "1e-6", "1"],
    "repetition_penalty": ["None", "1e-6", "1", "1.0001", "2"],
}
RANGES = {
    "temperature": "a number in [0, 1e30]",
    "top_k": "a non-negative integer",
    "top_p": "a number in [0, 1]",
    "min_p": "a number in [0, 1]",
    "repetition_penalty": "a number in [1e-30, 1e30]",
}
GRID = [(name, label) for name in TAKEN for label in VALUES]


@pytest.mark.parametrize(("name", "label"), GRID, ids=["=".join(pair) for pair in GRID])
def test_the_table_of_sampling_parameters(name: str, label: str, broken: Path, complaint: Complaint) -> None:
    value = VALUES[label]
    if label in TAKEN[name]:
        Sampling(**{name: value})
    else:
        with pytest.raises(ValueError) as caught:
            Sampling(**{name: value})
        assert str(caught.value) == f"{name} must be {RANGES[name]}, not {value!r}"
    # On the command line every value is text: "1" is the number, and a model that cannot be read shows what was taken.
    option = f"--{name.replace('_', '-')}={value}"
    taken = (label in TAKEN[name] and label != "None") or label == "text"
    line = complaint("generate", "x", option, "--model", broken, code=1 if taken else 2)
    assert ("config.json: not valid JSON" in line) is taken
    assert taken or name in line or option.split("=")[0] in line


ONLY_THE_LIKELIEST: dict[str, list[float]] = {
    "top_k": [1],
    "top_p": [-0.0, 0, 1e-40, 1e-6],
    "min_p": [1],
    "temperature": [-0.0, 0, 1e-40],
}
EXTREMES: dict[str, list[float]] = {"repetition_penalty": [1e-30, 1e30], "temperature": [1e30], "top_k": [2**63 - 1]}


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("name", TAKEN)
def test_every_value_taken_draws_and_the_narrow_ones_draw_the_likeliest(name: str, temperature: float) -> None:
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)).mul(8)
    logits[:, 7] = 40  # the likeliest by far
    logits[:, 8] = 0  # 0 times infinity would be NaN
    seen = torch.arange(0, 600, 2).expand(3, -1)  # 7 is not among them, 8 is
    for value in [*(VALUES[label] for label in TAKEN[name]), *EXTREMES.get(name, [])]:
        sampling = Sampling(**{"temperature": temperature, name: value})
        generator = torch.Generator().manual_seed(0)
        penalised = repetition_penalty(sampling.repetition_penalty, torch.zeros(3, 1))(seen, logits)
        tokens = torch.stack([sample(penalised, sampling, generator) for _ in range(20)])
        assert bool(((tokens >= 0) & (tokens < 600)).all())
        if value in ONLY_THE_LIKELIEST.get(name, []) or (sampling.temperature <= 1e-6 and name != "repetition_penalty"):
            assert bool((tokens == 7).all()), value
