"""Perplexity: each protocol beside its own program's arithmetic, written here once more over all logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gemma2
from gemma2.cli import main
from gemma2.evaluate.perplexity import DOCUMENTS, LLAMA_CPP, TRANSFORMERS, perplexity, work
from gemma2.scoring import hidden, token_logprobs
from tests.parity.recordings import PARITY, file, prompt
from tests.test_cli_ablate import VERSES

PLAIN = ["--device", "cpu", "--dtype", "float32"]
Floats = Any  # a numpy array


@pytest.fixture(scope="module")
def pocket() -> gemma2.Gemma:
    return gemma2.load(dtype="float32", device="cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "verses.txt"
    path.write_text(VERSES, encoding="utf-8")
    return path


def logits_of(model: Any, row: list[int]) -> Floats:
    with torch.no_grad():
        return model(torch.tensor([row]))[0].numpy()


def llama_cpp(
    model: Any, ids: list[int], n_ctx: int, chunks: int | None = None
) -> tuple[float, float, list[float], int]:
    """`perplexity` of llama.cpp's tools/perplexity/perplexity.cpp: PPL, its error, the running values, the count.
    Exponentials are float32 and sums double, as in its `log_softmax`."""
    tokens, first = list(ids), n_ctx // 2
    nll = nll2 = 0.0
    count, running = 0, []
    for chunk in range(len(tokens) // n_ctx)[:chunks]:
        part = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
        part[0] = 2
        logits = model(part)
        for i in range(first, n_ctx - 1):
            row = logits[i]
            total = np.exp(row - row.max()).astype(np.float64).sum()
            v = -(float(row[part[i + 1]] - row.max()) - math.log(total))
            nll, nll2 = nll + v, nll2 + v * v
        count += n_ctx - first - 1
        running.append(math.exp(nll / count))
    nll, nll2 = nll / count, nll2 / count
    value = math.exp(nll)
    return value, math.sqrt((nll2 - nll * nll) / (count - 1)) * value, running, count


@pytest.mark.parametrize(("context", "chunks"), [(32, None), (31, None), (24, 2)])
def test_llama_cpp_s_protocol_is_that_of_its_program(pocket: gemma2.Gemma, context: int, chunks: int | None) -> None:
    ids = pocket.tokenizer.encode(VERSES)
    wanted, error, running, count = llama_cpp(lambda row: logits_of(pocket.model, row), ids, context, chunks)
    found = perplexity(pocket, VERSES, LLAMA_CPP, context=context, chunks=chunks, batch=2)
    assert found.value == pytest.approx(wanted, rel=1e-5)
    assert found.plus_minus == pytest.approx(error, rel=1e-4)
    assert found.running == pytest.approx(running, rel=1e-5) and len(running) > 1
    assert found.tokens == count and found.stride is None and found.bits_per_byte is None


def test_the_newline_at_the_end_of_a_file_is_left_out_as_llama_cpp_does(pocket: gemma2.Gemma) -> None:
    text = VERSES.rstrip()
    assert len(pocket.tokenizer.encode(f"{text}\n")) == len(pocket.tokenizer.encode(text)) + 1
    context = 24
    while len(pocket.tokenizer.encode(f"{text}\n")) % context:  # the newline would complete a chunk
        text += " And"
    without = perplexity(pocket, text, context=context)
    assert perplexity(pocket, f"{text}\n", context=context) == without
    whole = perplexity(pocket, pocket.tokenizer.encode(f"{text}\n"), context=context)
    assert len(whole.running) == len(without.running) + 1


@pytest.mark.parametrize("name", ["f32", "q8_0", "q4_k_m"])
def test_llama_cpp_s_own_logits_give_the_same_nats(name: str) -> None:
    tokens, recorded = prompt(), load_file(PARITY / "llama_cpp_logits.safetensors")[name].double()
    gemma = gemma2.load(file(name), dtype="float32", device="cpu")
    targets = tokens[0, -len(recorded) + 1 :]
    wanted = -recorded[:-1].log_softmax(-1).gather(1, targets[:, None]).mean()
    states = hidden(gemma.model, tokens)[0, -len(recorded) : -1]
    nats = -float(token_logprobs(gemma.model, states, targets).logprobs.double().mean())
    # Its quantized products round activations to 8 bits, ours do not: only F32 is the same arithmetic.
    assert nats == pytest.approx(float(wanted), rel=2e-5 if name == "f32" else 2e-3)


def test_llama_cpp_itself_gives_the_same_perplexity() -> None:
    peer = pytest.importorskip("llama_cpp", reason="the live comparison needs the extra gemma2[llama-cpp]")
    path, ids, context = file("f32"), prompt()[0].tolist(), 16

    def run(row: list[int]) -> Floats:
        options = {"type_k": 0, "type_v": 0, "flash_attn": False, "logits_all": True, "verbose": False}
        other = peer.Llama(str(path), n_ctx=context, n_batch=context, **options)
        other.eval(row)
        return other.scores[: len(row)].copy()

    gemma = gemma2.load(path, dtype="float32", device="cpu")
    wanted, error, running, count = llama_cpp(run, ids, context)
    found = perplexity(gemma, [2, *ids[1:]], LLAMA_CPP, context=context)
    assert found.value == pytest.approx(wanted, rel=1e-4) and found.plus_minus == pytest.approx(error, rel=1e-4)
    assert found.running == pytest.approx(running, rel=1e-4) and found.tokens == count


@pytest.mark.parametrize(("context", "stride"), [(48, 20), (40, 40), (500, 100), (30, 1)])
def test_transformers_guide_gives_the_same_perplexity(
    pocket: gemma2.Gemma, context: int, stride: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pocket") / "float32"
    gemma2.save(pocket, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    ids = torch.tensor([pocket.tokenizer.encode(VERSES)])
    # The loop of transformers' guide "Perplexity of fixed-length models".
    seq_len, nll_sum, n_tokens, prev_end_loc = ids.size(1), 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + context, seq_len)
        trg_len = end_loc - prev_end_loc
        input_ids = ids[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        num_loss_tokens = int((target_ids != -100).sum()) - 1
        if num_loss_tokens:  # else the first label of a window may have no prediction, and the mean is NaN
            nll_sum += float(loss) * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    found = perplexity(pocket, VERSES, TRANSFORMERS, context=context, stride=stride)
    assert found.value == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-5)


def test_documents_are_scored_whole_and_each_by_itself(pocket: gemma2.Gemma) -> None:
    texts = [VERSES, VERSES[50:180], "And"]
    found = perplexity(pocket, texts, DOCUMENTS)
    scores = [pocket.score(text) for text in texts]
    nats, tokens = -sum(one.total for one in scores), sum(len(one.ids) for one in scores)
    assert found.nats == pytest.approx(nats / tokens, abs=1e-6) and found.tokens == tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(text) for text in texts), abs=1e-6)
    assert len(found.running) == 3 and found.running[0] == pytest.approx(scores[0].perplexity)
    short = perplexity(pocket, texts, DOCUMENTS, context=16, stride=4, chunks=1)
    assert short.nats == pytest.approx(-pocket.score(VERSES, window=16, stride=4).total / short.tokens)


@pytest.mark.parametrize("protocol", [LLAMA_CPP, TRANSFORMERS, DOCUMENTS])
def test_the_work_is_known_before(pocket: gemma2.Gemma, protocol: str) -> None:
    ticks: list[int] = []
    options = {"context": 32, "stride": None if protocol == LLAMA_CPP else 16}
    perplexity(pocket, VERSES, protocol, **options, tick=ticks.append)
    tokens = len(pocket.tokenizer.encode(VERSES))
    planned = work(tokens, protocol, 32, options["stride"])
    assert sum(ticks) == planned or protocol == DOCUMENTS  # whose windows overlap


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "gpt"}, "there is no protocol 'gpt': there are llama.cpp, transformers, documents"),
        ({"context": 9000}, "context 9,000 is beyond the model's context of 1,024"),
        ({"stride": 8}, "llama.cpp's protocol has no stride"),
        ({"context": 3}, "context must be an integer of at least 4"),
        ({"context": 64}, "the text has .* tokens: llama.cpp's protocol needs at least twice the context of 64"),
        ({"protocol": TRANSFORMERS, "context": 8, "stride": 9}, "stride 9 is longer than the context of 8"),
        ({"chunks": 0}, "chunks must be a positive integer"),
        ({"texts": ["a", "b"]}, "takes one text, not 2"),
        ({"texts": "", "protocol": TRANSFORMERS}, "the text has 1 tokens: there is none to score"),
        ({"texts": ["a", ""], "protocol": DOCUMENTS}, "text 1 is empty"),
        ({"texts": list(range(700, 800)), "context": 16}, r"do not begin with the BOS \(2\)"),
        ({"texts": list(range(700, 800)), "protocol": TRANSFORMERS}, r"do not begin with the BOS \(2\)"),
        ({"texts": [None]}, "a text must be text or a list of token ids, not None"),
        ({"texts": None}, "give a text, a list of token ids"),
        ({"texts": []}, "there is no text to score"),
    ],
)
def test_what_has_no_perplexity_is_refused(pocket: gemma2.Gemma, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(pocket, **({"texts": VERSES[:330]} | options))


def test_the_command_prints_what_the_function_returns(
    pocket: gemma2.Gemma, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["perplexity", "pocket", "--text", str(text), "--context", "24", *PLAIN]
    found = perplexity(pocket, VERSES, context=24)
    assert main([*asked, "--running"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"[1]{found.running[0]:.4f},[2]") and first.count("[") == len(found.running)
    assert lines[1] == f"perplexity  {found.value:.4f} +/- {found.plus_minus:.5f}"
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(found.value, rel=1e-5)


def test_texts_that_cannot_be_read_are_refused_before_a_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "bad.txt": (b"\xff\xfe", "not valid UTF-8 at byte 0"),
        "empty.txt": (b"", "is empty; there is no text to score"),
        "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        "blank.jsonl": (b'{"text": "a"}\n\n', "line 2: not JSON"),
        "other.jsonl": (b'{"words": "a"}', 'line 1: must be a JSON object with "text"'),
        "nothing.jsonl": (b'{"text": "a"}\n{"text": ""}', "line 2: an empty text has no token to score"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert main(["perplexity", "absent", "--text", str(tmp_path / name), "--protocol", "documents"]) == 2
        assert message in capsys.readouterr().err
    assert main(["perplexity", "absent", "--text", str(tmp_path / "absent.txt")]) == 1
    (tmp_path / "good.txt").write_text("a", encoding="utf-8")
    capsys.readouterr()
    for options, message in (
        (["--window", "1"], "--window must be an integer of at least 2"),
        (["--window", "8", "--stride", "9"], "stride 9 is longer than the window of 8"),
    ):
        assert main(["score", str(tmp_path / "good.txt"), "--model", "absent", *options]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "two.jsonl").write_text('"a"\n"b"\n', encoding="utf-8")
    assert main(["perplexity", "absent", "--text", str(tmp_path / "two.jsonl")]) == 2
    assert "takes one text" in capsys.readouterr().err


def test_score_prints_figures_tokens_and_json(
    pocket: gemma2.Gemma, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = pocket.score(VERSES)
    assert main(["score", str(text), "--tokens", "--reference", *PLAIN]) == 0
    out = capsys.readouterr().out
    assert f"{-found.total:.4f}" in out and f"{found.bits_per_byte:.6f}" in out and "·came" in out
    assert len(out.splitlines()) == 1 + len(found.ids) + 1 + 2
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"context": "In the", "continuation": " beginning"}\n"And he said"\n', encoding="utf-8")
    assert main(["score", str(pairs), "--json", "--reference", *PLAIN]) == 0
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["total"] == pytest.approx(pocket.score(("In the", " beginning")).total, abs=1e-4)
    assert two["pieces"] == ["And", " he", " said"]
    assert main(["score", str(pairs), "--reference", *PLAIN]) == 0
    assert "all 2" in capsys.readouterr().out
