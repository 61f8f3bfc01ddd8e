"""Acceptance on published figures, tested on a stand-in: figures of the pocket model's own, which it passes, and the
same with one number changed, which fails by its name. Those of real weights are read, and checked in themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import accept_real_weights
import pytest
import torch

import gemma2
from gemma2.checkpoints.checkpoint import named_tokenizer
from gemma2.checkpoints.hf_config import configs, published_config
from gemma2.checkpoints.weights import shapes_of
from gemma2.evaluate import acceptance
from gemma2.evaluate.figures import KINDS, read_figures, spelled
from gemma2.evaluate.perplexity import perplexity
from gemma2.research import capture
from tests.conftest import SHARED

OUTCOMES = ("pass", "near-tie", "FAIL", "differs", "not tried")
REAL = configs() / accept_real_weights.FIGURES
PROMPT, OTHER = "In the beginning", "And God said, Let there be"
TEXT = "And it came to pass in those days, that the people said unto the king, What shall we do? " * 8
LONG = {"repeat": "And God said. ", "times": 60, "then": "And there was"}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def stand_in() -> dict[str, Any]:
    """Figures as they would be published of the pocket model."""
    gemma = gemma2.load(device="cpu", dtype="float32")
    ids = gemma.tokenizer.encode(PROMPT)
    with torch.no_grad(), capture(gemma.model, ["hook_embed", "ln_final", "logits"]) as seen:
        gemma.model(torch.tensor([ids]))
    best = seen["logits"][0, -1].topk(10)
    prompts: list[Any] = [PROMPT, OTHER]
    long = [LONG, PROMPT]
    state = seen["ln_final"][0, -1]
    last = {"position": len(ids) - 1, "first": state.tolist(), "norm": float(state.norm())}
    embedded = seen["hook_embed"][0].bfloat16().float()
    rows = [{"position": i, "first": row[:3].tolist(), "last": row[-3:].tolist()} for i, row in enumerate(embedded)]
    shapes = shapes_of(gemma.config)
    checks: list[dict[str, Any]] = [
        {"name": "size", "kind": "parameters", "parameters": 5773568, "tensors": len(shapes)},
        {"name": "ids", "kind": "tokens", "texts": [[PROMPT, ids]]},
        {
            "name": "likeliest",
            "kind": "top",
            "ids": ids,
            "top": [[i, x] for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
            "within": 1e-3,
        },
        {"name": "residual", "kind": "values", "ids": ids, "site": "ln_final", "within": 1e-3, "rows": [last]},
        {
            "name": "embedding",
            "kind": "values",
            "ids": ids,
            "site": "hook_embed",
            "rows": rows,
            "dtypes": ["bfloat16"],
        },
        {
            "name": "texts",
            "kind": "text",
            "prompts": prompts,
            "new_tokens": 8,
            "texts": gemma.generate([spelled(prompt) for prompt in prompts], max_new_tokens=8),
            "tie": 0.0,
        },
        {
            "name": "beyond the window",
            "kind": "text",
            "prompts": long,
            "new_tokens": 4,
            "texts": gemma.generate([spelled(prompt) for prompt in long], max_new_tokens=4),
            "tie": 0.0,
        },
        {
            "name": "perplexity",
            "kind": "perplexity",
            "type": "BF16",
            "context": 64,
            "value": perplexity(gemma, TEXT, context=64).value,
            "within": 1e-4,
        },
        {"name": "another machine's", "kind": "untried", "why": "nobody has that machine"},
    ]
    numbers = {"num_hidden_layers": 6, "hidden_size": 256, "chat": False}
    other = {"name": "of another", "kind": "untried", "models": ["large"], "source": "us", "why": "-"}
    return {
        "format": "gemma2-figures 1",
        "models": {"pocket": numbers, "large": {"num_hidden_layers": 99, "chat": False}},
        "sources": {"us": "this test"},
        "checks": [*({"models": ["pocket"], "source": "us"} | check for check in checks), other],
    }


def ran(tmp_path: Path, figures: dict[str, Any], *options: str, model: str = "pocket") -> int:
    (tmp_path / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return accept_real_weights.main([model, "--figures", str(tmp_path / "figures.json"), "--device", "cpu", *options])


def outcomes(out: str) -> list[tuple[str, str]]:
    lines = [line for line in out.splitlines() if line[:9].strip() in OUTCOMES]
    return [(line[:9].strip(), line[11:].partition(":")[0]) for line in lines]


def test_a_model_passes_on_its_own_figures_and_the_rest_is_said(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    assert ran(tmp_path, stand_in, "--text", str(tmp_path / "text")) == 0
    out = capsys.readouterr().out
    found = outcomes(out)
    names = ["size", "size", "ids", "another machine's", "embedding", "embedding", "embedding", "embedding"]
    names += ["likeliest", "residual", "texts", "texts", "beyond the window", "beyond the window", "perplexity"]
    assert [name for _, name in found] == names
    assert {outcome for outcome, name in found if name != "another machine's"} == {"pass"}
    assert "not tried  another machine's: nobody has that machine" in out
    assert "pocket, as pocket: 14 pass, 1 not tried" in out
    assert "1 published figures are of other models: large" in out


def changed(figures: dict[str, Any], name: str) -> dict[str, Any]:
    """The same figures with one number of one check changed, by little more than its tolerance."""
    new = copy.deepcopy(figures)
    check = next(check for check in new["checks"] if check["name"] == name)
    if name == "size":
        check["parameters"] += 1
    elif name == "ids":
        check["texts"][0][1][-1] += 1
    elif name == "likeliest":
        check["top"][4][1] += 2e-3
    elif name == "residual":
        check["rows"][0]["first"][77] -= 2e-3
    elif name == "embedding":
        check["rows"][1]["last"][2] *= 1.02
    elif name == "perplexity":
        check["value"] *= 1.001
    else:
        check["texts"][0] = check["texts"][0][:-1] + "~"
    return new


@pytest.mark.parametrize("name", ["size", "ids", "likeliest", "residual", "embedding", "texts", "perplexity"])
def test_one_changed_number_fails_and_is_named(
    name: str, stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    assert ran(tmp_path, changed(stand_in, name), "--only", name, "--text", str(tmp_path / "text")) == 1
    out = capsys.readouterr().out
    failed = [found for outcome, found in outcomes(out) if outcome == "FAIL"]
    assert failed == [name] and out.splitlines()[-1].startswith(f"failed: {name}")
    if name == "residual":
        assert "1 of them beyond, first number 77" in out


def test_a_choice_between_equals_is_a_near_tie_and_no_failure(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    tied = copy.deepcopy(stand_in)
    top = next(check for check in tied["checks"] if check["name"] == "likeliest")
    top["top"][0], top["top"][1] = [top["top"][1][0], top["top"][0][1]], [top["top"][0][0], top["top"][1][1]]
    top["within"] = abs(top["top"][0][1] - top["top"][1][1]) * 1.01
    texts = next(check for check in tied["checks"] if check["name"] == "texts")
    texts["texts"][0], texts["tie"] = " ~", 1e3
    tied["checks"] = [next(check for check in tied["checks"] if check["name"] == "size"), top, texts]
    assert ran(tmp_path, tied) == 0
    out = capsys.readouterr().out
    assert ("near-tie", "likeliest") in outcomes(out) and ("near-tie", "texts") in outcomes(out)
    assert "which are up to" in out and "leads" in out and "at new token 1" in out


def test_a_norm_and_a_likeliest_token_that_was_not_published_are_seen(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    other = copy.deepcopy(stand_in)
    other["checks"] = [check for check in other["checks"] if check["name"] in ("size", "likeliest", "residual")]
    del other["checks"][1]["top"][0]  # what leads by more than the tolerance
    other["checks"][2]["rows"][0]["norm"] += 2e-3
    assert ran(tmp_path, other) == 1
    out = capsys.readouterr().out
    assert ("FAIL", "likeliest") in outcomes(out) and ("FAIL", "residual") in outcomes(out)
    assert "257 values up to 0.002 apart" in out and "1 of them beyond, first number 256" in out


def test_a_value_without_a_tolerance_is_equal_once_rounded(stand_in: dict[str, Any], tmp_path: Path) -> None:
    printed = copy.deepcopy(stand_in)
    rows = next(check for check in printed["checks"] if check["name"] == "embedding")["rows"]
    for row in rows:
        row["first"] = [x * (1 + 5e-4) for x in row["first"]]  # less than half a step of bfloat16
    assert ran(tmp_path, printed, "--only", "embedding") == 0


def test_a_figure_whose_run_is_not_known_differs_and_does_not_fail(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    loose = changed(stand_in, "residual")
    next(check for check in loose["checks"] if check["name"] == "residual")["gate"] = False
    assert ran(tmp_path, loose, "--only", "si") == 0  # size and residual
    assert ("differs", "residual") in outcomes(capsys.readouterr().out)


def test_what_does_not_fit_or_is_of_other_weights_is_not_tried_and_says_why(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ran(tmp_path, stand_in, model="pocket:pocket-q8_0.gguf") == 0
    out = capsys.readouterr().out
    assert "likeliest: it is of weights that are not quantized, and MODEL is Q8_0" in out
    assert "perplexity: it is of a BF16 file, and MODEL is Q8_0" in out
    assert {outcome for outcome, _ in outcomes(out)} == {"pass", "not tried"}
    assert ran(tmp_path, stand_in, "--only", "perplexity") == 1  # nothing passed
    out = capsys.readouterr().out
    assert "give its text by --text FILE" in out and "nothing could be tried" in out

    strange = copy.deepcopy(stand_in)
    strange["checks"] = [check for check in strange["checks"] if check["name"] in ("likeliest", "residual")]
    strange["checks"][0]["top"][9][0] = 99999
    strange["checks"][1]["rows"][0]["first"] *= 2
    assert ran(tmp_path, strange) == 1
    out = capsys.readouterr().out
    assert "not tried  likeliest: token id 99999 is outside the vocabulary" in out
    assert "not tried  residual: it states more values than the 256 at ln_final" in out

    def full(*args: Any, dtype: torch.dtype, **options: Any) -> gemma2.Gemma:
        if dtype == torch.float32:
            raise MemoryError("pocket: the weights need 23 GB in float32, and 1 GB are free on cpu. What fits: less")
        return gemma2.load(*args, dtype=dtype, **options)

    monkeypatch.setattr(acceptance, "load", full)
    either = copy.deepcopy(stand_in)
    either["checks"] = [check for check in either["checks"] if check["name"] in ("likeliest", "texts", "embedding")]
    either["checks"][2]["dtypes"] = ["float32", "bfloat16"]
    ran(tmp_path, either)
    out = capsys.readouterr().out
    assert "not tried  likeliest: pocket: the weights need 23 GB in float32, and 1 GB are free on cpu\n" in out
    assert "(in bfloat16: pocket: the weights need 23 GB" in out and ("pass", "embedding") in outcomes(out)


def test_a_quantized_files_perplexity_is_tried_on_its_own_type(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    new = copy.deepcopy(stand_in)
    next(check for check in new["checks"] if check["name"] == "perplexity").update(type="Q8_0", within=0.05)
    options = ("--only", "perplexity", "--text", str(tmp_path / "text"))
    assert ran(tmp_path, new, *options, model="pocket:pocket-q8_0.gguf") == 0
    assert outcomes(capsys.readouterr().out) == [("pass", "perplexity")]
    next(check for check in new["checks"] if check["name"] == "perplexity").update(type="F16")
    assert ran(tmp_path, new, *options) == 0  # of the pocket model in BF16, which is not quantized either


def test_json_says_the_same_and_bad_arguments_are_one_line(
    stand_in: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    assert ran(tmp_path, stand_in, "--json", "--only", "size") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["which"], found["exit"], len(found["results"])) == ("pocket", 0, 2)
    for options, said in (
        (("--only", "nothing"), "no figure of pocket has 'nothing' in its name"),
        (("--as", "large"), "has not the numbers of 'large'; it could be pocket"),
        (("--text", "nowhere"), "--text nowhere: no such file"),
    ):
        assert ran(tmp_path, stand_in, *options) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert accept_real_weights.main(["pocket"]) == 1
    assert "no figure was published of a model of its shape" in capsys.readouterr().err
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    figures = str(tmp_path / "figures.json")
    argv = ["--figures", figures, "--text", str(tmp_path / "text"), "--only", "perplexity", "--device", "cpu"]
    assert accept_real_weights.main(["absent", *argv]) == 1  # before a model is looked for
    assert "not valid UTF-8 at byte 0" in capsys.readouterr().err
    (tmp_path / "text").write_text("too short", encoding="utf-8")
    assert accept_real_weights.main(["pocket", *argv]) == 1
    assert "not tried  perplexity: the text has" in capsys.readouterr().out


def test_a_folder_with_it_in_another_word_is_no_tuned_model() -> None:
    figures = read_figures(REAL)
    opened: Any = Named(gemma2.published_config("gemma-2-2b"))
    for source, name in (
        ("google/gemma-2-2b", "2b"),
        ("google/gemma-2-2b-it", "2b-it"),
        ("/data/my-items/gemma-2-2b", "2b"),
        ("models/gemma-2-2b-it/model.safetensors", "2b-it"),
        ("owner/GGUF:gemma-2-2b-it-Q4_K_M.gguf", "2b-it"),
        ("gemma-2-2b-IT.gguf", "2b-it"),
    ):
        assert acceptance.which_model(figures, opened, source) == name, source


class Named:
    """A checkpoint without weights or a chat template."""

    chat_tuned = False

    def __init__(self, config: gemma2.Gemma2Config) -> None:
        self.config = config


# The figures of real weights.


def test_every_figure_of_real_weights_states_its_source_its_models_and_what_it_needs() -> None:
    figures = read_figures(REAL)
    assert set(figures.models) == {"2b", "2b-it", "9b", "9b-it", "27b", "27b-it"}
    assert {check.kind for check in figures.checks} == set(KINDS)
    for name in ("2b", "9b", "27b"):
        assert figures.candidates(published_config(f"gemma-2-{name}")) == [name, f"{name}-it"]
        mine = [check for check in figures.checks if name in check.models and check.kind not in ("untried", "tokens")]
        assert len(mine) >= 7, name
    names = [check.name for check in figures.checks if check.kind == "values"]
    assert len([name for name in names if name.startswith("last normalised residual")]) == 3
    for check in figures.checks:
        assert len(check.source) > 60 or check.kind in ("untried", "tokens"), check.name
        config = published_config(f"gemma-2-{check.models[0].removesuffix('-it')}")
        if check.kind == "parameters":
            shapes = shapes_of(config).values()
            assert check.given["parameters"] == sum(torch.Size(shape).numel() for shape in shapes)
            assert check.given["tensors"] == len(shapes)
        if check.kind == "top":
            logits = [logit for _, logit in check.given["top"]]
            assert logits == sorted(logits, reverse=True) and len(logits) == 10 and max(logits) < 30
            assert all(0 <= number < config.vocab_size for number, _ in check.given["top"])
        if check.name.startswith("last normalised"):
            (row,) = check.given["rows"]
            assert len(row["first"]) == config.hidden_size and row["position"] == len(check.given["ids"]) - 1


def test_the_three_residuals_have_their_massive_channels_in_the_same_places() -> None:
    """A sign that none of the 6,912 numbers is missing or stands elsewhere: such channels belong to a model."""
    rows = [check.given["rows"][0]["first"] for check in read_figures(REAL).checks if "residual of" in check.name]
    largest = [set(torch.tensor(row).abs().topk(16).indices.tolist()) for row in rows]
    assert len(largest[0] & largest[1] & largest[2]) >= 5
    assert max(abs(x) for x in rows[0]) == abs(rows[0][1173]) == 60.1941


@pytest.mark.needs("shared", "data/gemma2-tokenizer/tokenizer.model")
def test_the_published_token_ids_and_texts_are_those_of_gemma_2s_own_tokenizer() -> None:
    given = named_tokenizer(SHARED / "data" / "gemma2-tokenizer" / "tokenizer.model")
    assert given is not None
    encode = given.tokenizer.encode
    checks = read_figures(REAL).checks
    texts = [pair for check in checks if check.kind == "tokens" for pair in check.given["texts"]]
    assert len(texts) == 7 and all(encode(text) == ids for text, ids in texts)
    for check in (check for check in checks if check.kind == "text"):
        for prompt, text in zip(map(spelled, check.given["prompts"]), check.given["texts"], strict=True):
            assert len(encode(prompt + text)) - len(encode(prompt)) == check.given["new_tokens"]
    (beyond,) = [check for check in checks if "more than 4,096" in check.name]
    assert len(encode(spelled(beyond.given["prompts"][0]))) > 4096


def stated(kind: str, **more: Any) -> dict[str, Any]:
    return {"checks": [{"name": "a", "kind": kind, "models": ["pocket"], "source": "us"} | more]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "x"}, "does not say format"),
        ({"checks": []}, "needs models and sources"),
        ({"models": {"pocket": {"width": 3}}}, "must state numbers of a config"),
        ({"checks": [{"name": "a", "kind": "b", "models": [], "source": "us"}]}, "kind is none of"),
        ({"checks": [{"name": "a", "kind": "text", "models": [], "source": "us"}]}, "must state prompts"),
        ({"checks": [{"name": "a", "kind": "untried", "why": "-", "models": ["x"], "source": "us"}]}, "is not among"),
        ({"checks": [{"name": "a"}]}, "does not state kind, models, source"),
        ({"checks": [{"name": "a", "kind": [], "models": [], "source": "us"}]}, "must be texts"),
        (stated("parameters", parameters="1", tensors=2), "parameters must be a positive integer"),
        (stated("tokens", texts=[["a", 2]]), "texts must be a list of [text, token ids]"),
        (stated("top", ids=[2, -1], top=[[1, 2.0]], within=1), "ids must be a list of token ids"),
        (stated("top", ids=[2], top=[[1, 2.0], [1, 3.0]], within=1), "each id once"),
        (stated("top", ids=[2], top=[[1, 2.0]], within=float("nan")), "within must be a number of at least 0"),
        (stated("values", ids=[2], site="ln_final", rows=[]), "rows must be a list of objects"),
        (stated("values", ids=[2], site="ln_final", rows=[{"position": 0}]), "rows must be a list of"),
        (
            stated("values", ids=[2], site="ln_final", rows=[{"position": 1, "first": [1]}]),
            "position 1 is beyond its 1",
        ),
        (stated("values", ids=[2], site="ln_final", rows=[{"position": 0, "norm": 1}]), "state within"),
        (stated("text", prompts=["a"], texts=[], new_tokens=3, tie=0), "texts must be a list of texts, one for each"),
        (stated("text", prompts=[{"repeat": "a"}], texts=["b"], new_tokens=3, tie=0), "prompts must be a list of"),
        (stated("untried", why=5), "why must be a text"),
    ],
)
def test_a_file_of_figures_that_is_none_is_refused(
    change: dict[str, Any], said: str, stand_in: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(stand_in | change), encoding="utf-8")
    with pytest.raises(gemma2.BadModelFile) as caught:
        read_figures(path)
    assert said in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
