"""`gemma2 eval`: tasks and a card measured on the pocket model, kept, resumed, refused. All data are here."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.cli import main
from gemma2.cli.eval import NEEDED
from gemma2.evaluate.card import default_card, read_card
from tests.ecosystem.conftest import needs

lm_eval = needs("lm_eval")

TASKS = Path(__file__).parent / "tasks"
CARD = ["--card", str(TASKS / "card.json"), "--include-path", str(TASKS), "--dtype", "float32", "--device", "cpu"]
MEASURED = [
    "pocket_choice.0-shot",
    "pocket_letter.2-shot",
    "pocket_rolling",
    "pocket_write.1-shot",
    "pocket_chat.0-shot",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The stand-in card measured on the pocket model, with the exit code."""
    out = tmp_path_factory.mktemp("eval") / "out"
    return out, main(["eval", "pocket", *CARD, "-o", str(out)])


@pytest.fixture
def out(done: tuple[Path, int], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[0], tmp_path / "out"))


def never(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("this is not reached")


def test_a_card_is_measured_end_to_end_and_what_cannot_be_is_named(
    done: tuple[Path, int], pocket: gemma2.Gemma
) -> None:
    folder, code = done
    assert code == 1  # the data of one task cannot be reached
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*(f"{name}.json" for name in MEASURED), "report.html", "report.md"]
    )
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| Next word | pocket_choice, 0-shot, acc | 92.86 ± 7.1 | 84 | 85 | agrees (+7.86) |" in text
    assert "| Bits a byte | pocket_rolling, bits_per_byte | 0.9" in text
    assert "Data of nobody | pocket_away, 0-shot, acc |  | 50 |  | it cannot be loaded: ConnectionError" in text
    assert "needs the environment variable GEMMA2_NO_SUCH_KEY" in text and "--run-code allows it" in text
    assert "The harness has no such benchmark." in text and "this checkpoint does not say that it was tuned" in text
    found = json.loads((folder / "pocket_rolling.json").read_text(encoding="utf-8"))["found"]["results"]
    docs = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text(encoding="utf-8").splitlines()][2:]
    scores = pocket.score([text for text in docs if text])
    bits = -sum(one.total for one in scores) / math.log(2) / sum(one.bytes for one in scores)
    # The harness's windows of the one long text do not overlap, and the later one has no BOS.
    assert found["pocket_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=0.02)


def test_a_second_run_measures_only_what_is_not_there(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "pocket_letter.2-shot.json").unlink()
    before = (out / "pocket_choice.0-shot.json").read_bytes()
    monkeypatch.setattr("gemma2.evaluate.harness.GemmaLM.generate_until", never)
    monkeypatch.setattr("gemma2.evaluate.harness.GemmaLM.loglikelihood_rolling", never)
    assert main(["eval", "pocket", *CARD, "-o", str(out), "--section", "verses", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("measured before") == 3 and "pocket_letter, 2-shot: 14 documents" in printed.err
    rows = {row["benchmark"]: row for row in json.loads(printed.out)["rows"]}
    assert rows["Next word"]["measured"] == pytest.approx(100 * 13 / 14)
    assert rows["Next word"]["published"] == {"pocket card": 84.0, "pocket report": 85.0}
    assert (out / "pocket_choice.0-shot.json").read_bytes() == before
    assert (out / "pocket_letter.2-shot.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "3"], "settings limit None, and now it is 3"),
        (["--bos", "every"], "settings bos 'once', and now it is 'every'"),
        (["--chat"], "settings chat False, and now it is True"),
    ],
)
def test_results_of_other_settings_are_refused_before_the_model_is_loaded(
    options: list[str], said: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.cli.eval.load_model", never)
    assert main(["eval", "pocket", *CARD, "-o", str(out), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and "not mixed" in error and "pocket_choice.0-shot.json" in error


def test_results_of_another_model_dtype_or_changed_task_are_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.evaluate.tasks.Tasks.run", never)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for model, more in (("pocket", ["--dtype", "bfloat16"]), ("pocket:pocket-q8_0.gguf", [])):
        assert main(["eval", model, *CARD, "-o", str(out), *more]) == 2
        assert "a result with model fingerprint" in capsys.readouterr().err
    changed = Path(shutil.copytree(TASKS, tmp_path / "tasks"))
    (changed / "choice.jsonl").write_text((changed / "verses.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["eval", "pocket", *CARD, "--include-path", str(changed), "-o", str(out)]) == 2
    assert "settings tasks" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_force_measures_again_what_does_not_fit(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--section", "verses", "--limit", "2", "--force"]
    assert main(["eval", "pocket", *CARD, "-o", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert "measured before" not in printed.err and "pocket_choice, 0-shot: 2 documents" in printed.err
    assert "Only the first 2 documents of a task were used" in printed.out and "not compared" in printed.out
    assert main(["eval", "pocket", *CARD, "-o", str(out), *options]) == 0  # what fits is kept
    assert capsys.readouterr().err.count("measured before") == 4


def test_an_interrupt_leaves_finished_tasks_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    options = ["eval", "pocket", *CARD, "-o", str(out), "--section", "verses"]
    with monkeypatch.context() as patch:
        patch.setattr("gemma2.evaluate.harness.GemmaLM.loglikelihood_rolling", interrupt)
        assert main(options) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert {file.name for file in out.iterdir() if not file.name.startswith(".")} == {
        "pocket_choice.0-shot.json",
        "pocket_letter.2-shot.json",
        "report.md",
        "report.html",
    }
    assert "not run yet" in (out / "report.md").read_text(encoding="utf-8")
    assert main(options) == 0
    assert capsys.readouterr().err.count("measured before") == 2
    assert "not run yet" not in (out / "report.md").read_text(encoding="utf-8")


def test_a_task_that_was_stopped_in_the_middle_asks_only_what_has_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "out", list[int]()
    options = ["eval", "pocket", "--tasks", "pocket_choice", *CARD[2:], "-o", str(out)]
    score = importlib.import_module("gemma2.scoring").score_ids

    def counted(model: Any, pairs: Any, **more: Any) -> Any:
        asked.append(len(pairs))
        return score(model, pairs, **more)

    def stopped(model: Any, pairs: Any, **more: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return counted(model, pairs, **more)

    monkeypatch.setattr("gemma2.evaluate.harness.SLICE", 10)
    with monkeypatch.context() as patch:
        patch.setattr("gemma2.evaluate.harness.score_ids", stopped)
        assert main(options) == 130
    kept = [file.name for file in out.iterdir() if not file.name.startswith("report")]
    assert asked == [10, 10, 10] and len(kept) == 1 and kept[0].startswith(".pocket_choice.")
    monkeypatch.setattr("gemma2.evaluate.harness.score_ids", counted)
    assert main(options) == 0
    assert sum(asked) == 14 * 4  # each once
    assert sorted(file.name for file in out.iterdir()) == ["pocket_choice.json", "report.html", "report.md"]
    whole = json.loads((out / "pocket_choice.json").read_text(encoding="utf-8"))["found"]["results"]["pocket_choice"]
    assert whole["acc,none"] == pytest.approx(13 / 14)


def test_tasks_by_name_are_measured_without_a_folder_and_show_every_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--include-path", str(TASKS), "--dtype", "float32", "--device", "cpu", "--shots", "1", "--limit", "4"]
    assert main(["eval", "pocket", "--tasks", "pocket_group,pocket_write", *options, "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert "pocket_group, 1-shot, acc" in printed and "pocket_write, 1-shot, exact_match (strip)" in printed
    assert not list(tmp_path.iterdir())


def test_a_tag_is_its_tasks_and_no_row_of_a_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--include-path", str(TASKS), "--dtype", "float32", "--device", "cpu", "--limit", "2", "--json"]
    assert main(["eval", "pocket", "--tasks", "pocket_questions", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["benchmark"] for row in rows} == {"pocket_choice", "pocket_letter"}
    card = tmp_path / "card.json"
    row = {"name": "r", "task": "pocket_questions", "metric": "acc"}
    card.write_text(json.dumps({"name": "c", "sections": [{"name": "s", "rows": [row]}]}), encoding="utf-8")
    assert main(["eval", "pocket", "--card", str(card), *options, "-o", str(tmp_path / "out")]) == 2
    assert "pocket_questions is a tag of several tasks" in capsys.readouterr().err


def test_an_unknown_task_is_refused_with_near_names_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.cli.eval.load_model", never)
    monkeypatch.setattr("gemma2.evaluate.tasks.Tasks._index", local_index)
    assert main(["eval", "pocket", "--tasks", "pocket_chioce", "--include-path", str(TASKS)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no task 'pocket_chioce' in lm-eval" in error and "near: pocket_choice" in error


def local_index(self: Any, defaults: bool) -> Any:
    """Without the harness's own 14,000 tasks, which take long to read."""
    return needs("lm_eval.tasks").TaskManager(include_path=self._folders, include_defaults=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--tasks NAME,... or --model-card"),
        (["--tasks", "a", "--model-card"], "one of them"),
        (["--tasks", " , "], "--tasks takes names"),
        (["--tasks", "a", "--size", "2b"], "--section and --size belong to a card"),
        (["--model-card"], "-o DIR is needed with a card"),
        (["--model-card", "-o", "x", "--shots", "3"], "--shots belongs to --tasks"),
        (["--model-card", "-o", "x", "--section", "y"], "no section 'y'; it has pre-trained, safety"),
        (["--model-card", "-o", "x", "--size", "3b"], "--size 3b: the card has 2b, 9b, 27b"),
        (["--tasks", "a", "--limit", "0"], "--limit must be a positive integer"),
        (["--tasks", "a", "--batch", "many"], "--batch is a number of texts, or auto"),
        (["--tasks", "a", "--fast", "--device-map", "auto"], "--fast is not for layers that --device-map spreads"),
        (["--tasks", "a", "--include-path", "no-such"], "no-such: no such folder"),
        (["--tasks", "a", "-o", __file__], "is a file; results need a folder"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemma2.cli.eval.load_model", never)
    assert main(["eval", "pocket", *arguments]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gemma2: error: ") and said in line and not list(tmp_path.iterdir())


def test_without_the_harness_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.cli.eval.find_spec", lambda name: None)
    assert main(["eval", "pocket", "--tasks", "hellaswag"]) == 1
    assert capsys.readouterr().err == f"gemma2: error: {NEEDED}\n"


@pytest.mark.long
def test_the_harness_has_each_task_metric_and_filter_of_the_model_card() -> None:
    index = needs("lm_eval.tasks").TaskManager().task_index
    for row in read_card(default_card()).rows:
        if row.task is None:
            continue
        given = part = index[row.task].cfg
        while isinstance(part.get("task"), list):  # a group: what its first part has, all have
            first = part["task"][0]
            name = first if isinstance(first, str) else first["task"]
            found = index[name]
            part = found.cfg or next(one.cfg for one in index.values() if name in one.tags and one.cfg)  # or a tag
        metrics = str(given.get("aggregate_metric_list", "")) + str(part.get("metric_list", ""))
        assert row.metric is not None and row.metric.replace("pass@1", "pass_at_k") in metrics, row.name
        filters = [one["name"] for one in part.get("filter_list", [])] or ["none"]
        assert row.filter in filters, (row.name, filters)
        assert part.get("num_fewshot") in (None, row.shots), row.name
        assert bool(part.get("unsafe_code")) == row.runs_code, row.name
