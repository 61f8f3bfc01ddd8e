"""Fine-tuning by `scripts/finetune.py`: what is learned of a line, runs that are killed and go on, and bad input."""

from __future__ import annotations

import copy
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import finetune
import pytest
import torch
from finetune_data import Example, batch, examples, read_records
from finetune_settings import HELP, Settings
from torch.nn import functional as F

import gemma2
from gemma2.chat import chat_ids
from tests.conftest import tiny

SCRIPT = Path(finetune.__file__)
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Who made the earth? <end_of_turn>"},
    {"role": "assistant", "content": " God made it. "},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": [{"type": "text", "text": "In the beginning.\nSo it is written."}]},
]
LINES: list[dict[str, Any]] = [
    {"text": "And God said, Let there be light: and there was light."},
    {"text": "In the beginning God created the heaven and the earth.", "source": "ignored"},
    {"messages": CHAT},
    {"text": "And he died."},
    {"messages": CHAT[:2]},
]
SMALL = {"autocast": False, "recompute": False, "batch": 2, "accumulate": 1, "length": 64, "rate": 1e-3, "warmup": 2}


def options(**changes: Any) -> list[str]:
    """The settings of a small full run as options."""
    given = {"settings": "full", "device": "cpu", **SMALL, "save_every": 2, **changes}
    said = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        said += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return said


def written(path: Path, lines: list[Any] = LINES) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def losses(out: Path) -> list[float]:
    found: list[float] = json.loads((out / "training.json").read_text(encoding="utf-8"))["losses"]
    return found


@pytest.fixture
def model(folder: Callable[..., Path]) -> Path:
    return folder(size="9b", num_hidden_layers=2)


def rows_of(lines: list[Any], tmp_path: Path, tokenizer: gemma2.Tokenizer, length: int = 64, **options: Any) -> Any:
    records = read_records(written(tmp_path / "lines.jsonl", lines))
    return [row for some in examples(records, tokenizer, length, **options) for row in some]


def test_of_a_text_all_is_learned_and_its_end(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    tokenizer = pocket.tokenizer
    (row,) = rows_of([{"text": "He died. <eos>"}], tmp_path, tokenizer)
    assert list(row.ids) == [*tokenizer.encode("He died. <eos>"), 1] and row.ids.count(1) == 1
    assert row.targets == list(row.ids[1:])


def test_of_a_conversation_the_replies_are_learned_and_nothing_else(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    tokenizer = pocket.tokenizer
    end = tokenizer.special["end_of_turn"]
    (row,) = rows_of([{"messages": CHAT}], tmp_path, tokenizer)
    prompt = chat_ids([*CHAT, {"role": "user", "content": "And then?"}], tokenizer)
    assert list(row.ids) == prompt[: len(row.ids)] and row.ids[-1] == end
    learned = [id for id, counts in zip(row.ids, row.counts, strict=True) if counts]
    assert learned.count(end) == 2 and row.ids.count(end) == 4  # and not the one that the user spelled
    first, second = " ".join(map(str, learned)).split(f" {end}")[:2]
    replies = [tokenizer.decode([int(id) for id in part.split()]) for part in (first, second)]
    assert replies == ["God made it.", "In the beginning.\nSo it is written."]
    # What the model is given to continue is what it was trained to continue.
    asked = chat_ids(CHAT[:3], tokenizer)
    assert list(row.ids[: len(asked)]) == asked and row.counts[len(asked)] and not row.counts[len(asked) - 1]


def test_a_system_message_is_merged_only_where_that_is_asked_for(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    lines = [{"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}]
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 1: chat: message 0 is from .system."):
        rows_of(lines, tmp_path, pocket.tokenizer)
    (row,) = rows_of(lines, tmp_path, pocket.tokenizer, system="merge")
    assert "Be brief.\n\nWho made" in pocket.tokenizer.decode(list(row.ids)) and sum(row.counts) == sum(
        rows_of([{"messages": CHAT}], tmp_path, pocket.tokenizer)[0].counts
    )


def test_a_text_beyond_the_length_is_refused_cut_or_split(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    tokenizer, text = pocket.tokenizer, "And he died. " * 12
    (whole,) = rows_of([{"text": text}], tmp_path, tokenizer)
    lines = [LINES[0], {"text": text}]
    with pytest.raises(ValueError, match=r"line 2: 50 ids are longer than a row of 20: give --length with more"):
        rows_of(lines, tmp_path, tokenizer, length=20)
    cut = rows_of(lines, tmp_path, tokenizer, length=20, long="cut")
    assert [row.cut for row in cut] == [False, True] and cut[1].ids == whole.ids[:21]
    parts = rows_of(lines, tmp_path, tokenizer, length=20, long="split")[1:]
    assert [len(row.ids) for row in parts] == [21, 21, 11] and {row.ids[0] for row in parts} == {2}
    assert [id for row in parts for id in row.targets] == whole.targets  # each token once
    assert rows_of([{"text": text}], tmp_path, tokenizer, length=len(whole.ids) - 1) == [whole]
    chat = [{"messages": [{"role": "user", "content": text}, CHAT[1]]}]
    with pytest.raises(ValueError, match=r"line 1: no reply begins in the first 20 of \d+ ids"):
        rows_of(chat, tmp_path, tokenizer, length=20, long="cut")
    with pytest.raises(ValueError, match=r"line 1: \d+ ids are longer than a row of 20: .* --long cut$"):
        rows_of(chat, tmp_path, tokenizer, length=20, long="split")


GOOD = json.dumps(LINES[0]).encode()
BAD: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"text": "And', r"line 3: not JSON \(Unterminated string .*, column 10\)"),
    "not UTF-8": (b'{"text": "\xff"}', r"line 3: not UTF-8 at byte 10 of the line"),
    "an empty text": (b'{"text": ""}', r"line 3: an empty text"),
    "white space": (b'{"text": " \\n"}', r"line 3: an empty text"),
    "no messages": (b'{"messages": []}', r"line 3: an empty conversation"),
    "no object": (b"[1, 2]", r"line 3: must be .*, not '\[1, 2\]'"),
    "neither": (b'{"prompt": "x"}', r'line 3: must be {"text": ...} or {"messages": \[...\]}'),
    "both": (b'{"text": "x", "messages": [1]}', r"line 3: must be"),
    "a number": (b'{"text": 3}', r"line 3: text must be a string, not int"),
    "many digits": (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", r"line 3: JSON with a number of too many digits"),
    "a lone surrogate": (b'{"text": "a\\ud800"}', r"line 3: text is not valid UTF-8: lone surrogate at character 1"),
    "nested": (b'{"text": ' + b"[" * 100_000 + b"}", r"line 3: (JSON that is nested|not JSON)"),
    "no reply": (b'{"messages": [{"role": "user", "content": "x"}]}', "line 3: there is no reply of the assistant"),
    "the user last": (
        json.dumps({"messages": CHAT[:3]}).encode(),
        "line 3: the last message must be the assistant's",
    ),
    "an empty reply": (
        json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}).encode(),
        "line 3: message 1 is an empty reply",
    ),
    "out of order": (
        json.dumps({"messages": [CHAT[1], CHAT[1]]}).encode(),
        "line 3: chat: ",
    ),
    "no role": (
        b'{"messages": [{"content": "x"}, {"role": "model", "content": "y"}]}',
        "line 3: chat: message 0 has role",
    ),
    "a text for messages": (b'{"messages": "x"}', "line 3: chat: messages must be a list of messages, not str"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_line_is_named_by_its_number(case: str, pocket: gemma2.Gemma, tmp_path: Path) -> None:
    line, match = BAD[case]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n\n" + line + b"\n" + GOOD)  # a byte order mark, and an empty line
    with pytest.raises(ValueError, match=match):
        list(examples(read_records(path), pocket.tokenizer, 64))
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n\n" + GOOD)
    assert len(list(examples(read_records(path), pocket.tokenizer, 64))) == 2


def test_a_file_without_a_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: there is no line"):
        read_records(tmp_path / "empty.jsonl")


def test_a_batch_has_the_loss_of_its_rows_alone(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    run = finetune.Training.__new__(finetune.Training)
    run.model, run.device, run.settings = tiny("9b", vocab_size=4096).double(), torch.device("cpu"), settings()
    rows = rows_of(LINES, tmp_path, pocket.tokenizer)
    alone = 0.0
    for row in rows:
        logits = run.model(torch.tensor([row.ids[:-1]]))[0]
        alone += F.cross_entropy(logits, torch.tensor(row.targets), reduction="sum").item()
    assert run.loss(rows).item() == pytest.approx(alone, rel=1e-12)
    _, positions, targets = batch(rows, run.device)
    assert (positions < 0).any() and bool((targets[positions < 0] == -100).all())


def test_a_step_is_adamw_on_the_clipped_mean_gradient_over_all_passes(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    model = tiny("9b", vocab_size=4096, num_hidden_layers=1).double()
    other = copy.deepcopy(model)
    rows, total = rows_of(LINES, tmp_path, pocket.tokenizer), 4
    given = settings(batch=2, accumulate=3, warmup=2, schedule="linear", clip=0.5, decay=0.3, rate=1e-2)
    run = finetune.Training(gemma2.Gemma(model, pocket.tokenizer), given, total)
    matrices, vectors = ([p for p in other.parameters() if (p.ndim > 1) == of] for of in (True, False))
    plain = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}])
    for step, rate in enumerate((0.5e-2, 0.75e-2, 0.5e-2, 0.25e-2)):  # it rises over 2 steps, and falls to 0
        loss, norm = run.gradient(rows)
        run.update()
        run.progress.step = step + 1
        plain.zero_grad()
        logits = [other(torch.tensor([row.ids[:-1]]))[0] for row in rows]
        mean = F.cross_entropy(torch.cat(logits), torch.tensor([id for row in rows for id in row.targets]))
        mean.backward()
        largest = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]).norm().item()
        assert loss == pytest.approx(mean.item(), rel=1e-9) and norm == pytest.approx(largest, rel=1e-6)
        assert step or largest > 0.5  # clipping matters
        for parameter in other.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.5 / largest)
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        for one, wanted in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, wanted, rtol=0, atol=2e-6)


def test_autocast_multiplies_in_bfloat16(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    gemma = gemma2.Gemma(tiny("9b", vocab_size=4096, num_hidden_layers=1), pocket.tokenizer)
    rows = rows_of(LINES, tmp_path, pocket.tokenizer)
    plain, rounded = (
        finetune.Training(gemma, settings(autocast=autocast), 1).loss(rows).item() for autocast in (False, True)
    )
    assert 1e-5 < abs(rounded - plain) / plain < 0.05


def settings(**changes: Any) -> Settings:
    stated = json.loads((SCRIPT.parents[1] / "configs" / "train" / "full.json").read_text(encoding="utf-8"))
    return Settings(**stated | SMALL | changes)


def test_every_row_is_seen_once_an_epoch_and_the_order_is_the_seeds() -> None:
    rows = [Example((2, i), (False, True)) for i in range(11)]
    each = [finetune.rows_of(step, rows, settings(batch=2, accumulate=2)) for step in range(6)]
    assert [len(some) for some in each] == [4, 4, 3, 4, 4, 3]
    for epoch in (each[:3], each[3:]):
        assert sorted(row.ids[1] for some in epoch for row in some) == list(range(11))
    assert each[0] != each[3] and each[0] != finetune.rows_of(0, rows, settings(batch=2, accumulate=2, seed=1))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_each_file_of_settings_has_every_one_and_each_is_an_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = SCRIPT.parents[1] / "configs" / "train" / f"{name}.json"
    names = [field.name for field in fields(Settings)]
    assert list(json.loads(path.read_text(encoding="utf-8"))) == names == list(HELP)
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in said for name in names)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--rate", "-1"], "rate must be a number from 0 on, not -1.0"),
        (["--rate", "nan"], "rate must be a number from 0 on, not nan"),
        (["--batch", "0"], "batch must be a whole number from 1 on, not 0"),
        (["--long", "drop"], "long must be one of refuse, cut, split, not 'drop'"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--seed", str(2**32)], "seed must be below 2^32, not 4294967296"),
        (["--rank", "4"], "rank must be none where the method is full"),
        (["--weights", "int8"], "weights must be none where the method is full"),
        (["--length", "100000"], "--length 100,000 is beyond the model's context of 256"),
        (["--device", "nowhere"], "nowhere"),
        (["--settings", "nothing.json"], "nothing.json"),
        (["--resume"], "there is no state to go on from"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_is_one_line(given: list[str], match: str, model: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl")
    with pytest.raises(SystemExit) as found:
        finetune.main([str(model), str(data), "--out", str(tmp_path / "out"), *options(), *given])
    said = str(found.value)
    assert said.startswith("finetune: error: ") and match in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_is_said_before_a_model_is_looked_for(tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for given, match in (
        ([str(data), "--out", str(tmp_path / "no" / "out")], "no: no such folder to write to"),
        ([str(data), "--out", str(tmp_path / "file")], "file: is a file; name a folder"),
        ([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")], r"No such file.*none\.jsonl"),
    ):
        stopped(["no-model", *given, *options()], match)


def test_a_file_of_settings_with_a_wrong_name_is_refused(model: Path, tmp_path: Path) -> None:
    stated = json.loads((SCRIPT.parents[1] / "configs" / "train" / "full.json").read_text(encoding="utf-8"))
    del stated["rate"]
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(stated | {"learning_rate": 1}), encoding="utf-8")
    data = written(tmp_path / "data.jsonl")
    run = [str(model), str(data), "--out", str(tmp_path / "out"), "--settings", str(mine)]
    stopped(run, r"mine\.json: must have every setting .* no other: learning_rate, rate")
    mine.write_text(json.dumps(stated | {"rate": 1e-3, "dtype": []}), encoding="utf-8")
    stopped(run, r"dtype must be one of .*, not \[\] \(.*mine\.json or --dtype\)")
    mine.write_text("[" * 100_000, encoding="utf-8")
    stopped(run, r"mine\.json: not JSON")


def test_the_pocket_model_learns_a_reply_and_the_result_loads_everywhere(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ask = {"role": "user", "content": "Who art thou?"}
    data = written(
        tmp_path / "chat.jsonl", [{"messages": [ask, {"role": "assistant", "content": "I am the pocket."}]}] * 2
    )
    out = tmp_path / "out"
    given = options(steps=12, rate=2e-3, recompute=True, evaluate_every=6)
    finetune.main(["pocket", str(data), "--out", str(out), "--held-out", str(data), *given])
    log = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert len(log["losses"]) == 12 and log["losses"][-1] < 0.2 < log["losses"][0] and log["result"] == "model"
    assert [step for step, _ in log["held_out"]] == [0, 6, 12]
    assert log["held_out"][0][1] == pytest.approx(log["losses"][0], rel=1e-5)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG") and sorted(path.name for path in out.iterdir()) == [
        "curve.png",
        "model",
        "training.json",
    ]
    tuned = gemma2.load(out / "model", device="cpu")
    with pytest.warns(UserWarning, match="may ramble"):
        assert tuned.chat([ask], 12) == "I am the pocket."
    tokens = torch.tensor([tuned.tokenizer.encode("In the beginning")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out / "model", dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, tuned.model(tokens))
    gemma2.convert(out / "model", tmp_path / "tuned.gguf", type="f32")
    again = gemma2.load(tmp_path / "tuned.gguf", device="cpu", dtype="float32")
    with torch.no_grad():
        assert torch.equal(again.model(tokens), tuned.model(tokens))


@pytest.mark.posix
def test_a_run_that_is_killed_goes_on_with_the_same_losses_to_the_bit(model: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl")
    common = [str(model), str(data), *options(epochs=20, save_every=10, evaluate_every=14), "--held-out", str(data)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune.main([*common, "--out", str(whole)])
    child = subprocess.Popen([sys.executable, SCRIPT, *common, "--out", str(broken)], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (broken / "state.pt").exists():
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.001)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL and not (broken / "model").exists()
    done = torch.load(broken / "state.pt")["progress"]["step"]
    assert 0 < done < 60, "it was killed too late to show anything"
    finetune.main([*common, "--out", str(broken), "--resume"])
    one, other = (json.loads((place / "training.json").read_text(encoding="utf-8")) for place in (whole, broken))
    assert one["losses"] == other["losses"] and len(one["losses"]) == 60
    assert one["held_out"] == other["held_out"]
    assert (whole / "model" / "model.safetensors").read_bytes() == (broken / "model" / "model.safetensors").read_bytes()
    assert not (broken / "state.pt").exists()


def stopped(run: list[str], match: str) -> None:
    with pytest.raises(SystemExit, match=match):
        finetune.main(run)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_state_is_kept(model: Path, tmp_path: Path) -> None:
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    # The rate grows by 1,000 a step, until float32 does not hold what the weights give.
    grows = options(rate=1e9, warmup=1_000_000, schedule="constant", clip=0, steps=40, save_every=1)
    run = [str(model), str(data), "--out", str(out), *grows]
    stopped(
        run, r"step \d+: the (loss|norm of the gradients) is (nan|inf); stopped, and .*state\.pt holds the state after"
    )
    log = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert log["stopped"].startswith("step ") and all(math.isfinite(loss) for loss in log["losses"])
    done = torch.load(out / "state.pt")["progress"]["step"]
    assert 1 < done == len(log["losses"]) - 1 < 39  # the last change gave the loss that is not finite
    stopped([*run, "--resume"], f"step {done + 2}: ")  # again: the state is as it was
    finetune.main([*run, "--finish"])
    with torch.no_grad():
        logits = gemma2.load(out / "model", device="cpu").model(torch.tensor([[2, 300]]))
    assert logits.isfinite().all() and not (out / "state.pt").exists()


def test_a_first_loss_that_is_not_finite_blames_no_rate(model: Path, tmp_path: Path) -> None:
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    broken = gemma2.load(model, dtype="float32", device="cpu")
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(3e38)
    gemma2.save(broken, tmp_path / "broken")
    run = [str(tmp_path / "broken"), str(data), "--out", str(out), *options()]
    stopped(run, r"step 1: .* no state was written before \(the weights or --dtype are the cause, not the training\)")
    assert not (out / "model").exists()
    stopped(
        [*run, "--force", "--held-out", str(data)], r"after step 0: the held-out loss is nan; .* not the training\)"
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    log = json.loads((out / "training.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert log["held_out"] == [] and log["stopped"].startswith("after step 0: ")


def test_weights_that_the_last_step_has_broken_are_no_result(model: Path, tmp_path: Path) -> None:
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    changes = options(rate=3.3e37, warmup=0, schedule="constant", clip=0, steps=1)
    stopped([str(model), str(data), "--out", str(out), *changes], r"after step 1: the loss is nan; stopped.*--rate or")
    assert not (out / "model").exists() and len(losses(out)) == 1


def kept_state(common: list[str], out: Path) -> Path:
    """Where a run of six steps is as if it had been killed in its last one."""
    kept: list[bytes] = []
    written_before = finetune.write_result

    def keep(*given: Any) -> Path:
        kept.append((out / "state.pt").read_bytes())
        return written_before(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "write_result", keep)
        finetune.main([*common, "--force"])
    (out / "state.pt").write_bytes(kept[0])
    return out / "state.pt"


def test_a_state_is_of_one_run_alone(model: Path, tmp_path: Path, folder: Callable[..., Path]) -> None:
    data, out = written(tmp_path / "data.jsonl"), tmp_path / "out"
    common = [str(model), str(data), "--out", str(out), *options(steps=6)]
    finetune.main(common)
    stopped(common, r"out: holds an earlier run; --force begins anew")
    state = dict(torch.load(kept_state(common, out)))
    assert state["progress"]["step"] == 4
    stopped([*common, "--resume", "--rate", "0.1"], "is a run with rate 0.001, and this is 0.1: not mixed")
    stopped([*common, "--resume", "--seed", "1"], "is a run with seed 0, and this is 1: not mixed")
    stopped([*common, "--resume", "--held-out", str(data)], "is a run of another held-out file")
    stopped([str(folder("other", size="2b", num_hidden_layers=2)), *common[1:], "--resume"], "run of another model")
    other = written(tmp_path / "other.jsonl", LINES[:3])
    stopped([common[0], str(other), *common[2:], "--resume"], "is a run of another data")
    stopped(common, "out: holds an unfinished run: --resume goes on, --force begins anew")
    (out / "state.pt").write_bytes(b"no state")
    stopped([*common, "--resume"], r"state\.pt: not a state of a training run")
    torch.save({"format": "other"}, out / "state.pt")
    stopped([*common, "--resume"], r"not a state of a training run of this version")
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    stopped([*common, "--force"], r"out: also holds mine\.txt; choose another folder")
