"""A folder of results: what belongs together, what is refused; and the report that is made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2.evaluate.card import Card, Row, Section, default_card, read_card
from gemma2.evaluate.page import in_page
from gemma2.evaluate.report import Report, lines, markdown
from gemma2.evaluate.results import Folder, Result

ABOUT: dict[str, Any] = {
    "model": {"fingerprint": "aa", "dtype": "bfloat16"},
    "settings": {"limit": None},
    "versions": {"gemma2": "1"},
}


def result(task: str = "mmlu", value: float = 0.5, error: float = 0.004, metric: str = "acc") -> Result:
    numbers = {task: {f"{metric},none": value, f"{metric}_stderr,none": error}}
    return Result(task, 5, {"results": numbers, "documents": {"a": 30, "b": 12}}, ABOUT, 1.5)


def test_a_result_is_read_back_where_everything_is_as_it_was(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    assert folder.read("mmlu", 5, ABOUT) is None and not folder.path.exists()
    folder.write(result(), {"name": "pocket"})
    found = folder.read("mmlu", 5, ABOUT)
    assert found is not None and found.value("acc", "none") == (0.5, 0.004) and found.documents == 42
    assert found.value("f1", "none") == (None, None) and found.metrics == [("acc", "none")]
    assert [file.name for file in folder.path.iterdir()] == ["mmlu.5-shot.json"]
    assert json.loads(folder.file("mmlu", 5).read_text(encoding="utf-8"))["machine"] == {"name": "pocket"}
    folder.check([("mmlu", 5), ("piqa", 0)], {"settings": ABOUT["settings"]})  # the model is not known yet


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "fingerprint", "bb"),
        ("model", "dtype", "float32"),
        ("settings", "limit", 10),
        ("versions", "gemma2", "2"),
    ],
)
def test_a_result_of_another_model_or_setting_is_refused(group: str, name: str, value: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write(result(), {})
    with pytest.raises(ValueError, match=rf"mmlu\.5-shot\.json: a result with {group} {name} .*{value!r}.* not mixed"):
        folder.read("mmlu", 5, ABOUT | {group: {name: value}})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "another"}', '{"format": "gemma2 eval 1"}', "\ud800".encode("utf-8", "surrogatepass")],
)
def test_a_file_that_is_no_result_is_refused(text: str | bytes, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.file("mmlu", 5).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="not a result of gemma2 eval; name another folder"):
        folder.read("mmlu", 5, ABOUT)


@pytest.mark.parametrize(
    "broken",
    [
        {"model": 5},
        {"seconds": "x"},
        {"found": {}},
        {"found": {"results": 5, "documents": {}}},
        {"found": {"results": {"mmlu": {"acc,none": "x"}}, "documents": {}}},
        {"found": {"results": {"mmlu": {"acc": 1}}, "documents": {}}},
        {"found": {"results": {}, "documents": {"mmlu": "many"}}},
    ],
)
def test_a_result_that_someone_broke_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write(result(), {})
    path = folder.file("mmlu", 5)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | broken), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mmlu\.5-shot\.json: not a result of gemma2 eval"):
        folder.read("mmlu", 5, ABOUT)


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; results need a folder"):
        Folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no such folder to write to"):
        Folder(tmp_path / "no" / "out")


def test_names_of_tasks_make_names_of_files(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.file("../a/b c", None).name == "-a-b-c.json" and folder.file("..", 0).parent == tmp_path


def report(value: float, error: float = 0.004, size: str | None = "2b", limit: int | None = None) -> Report:
    card = read_card(default_card())
    return Report(card, "a model", size, {("mmlu", 5): result(value=value, error=error)}, {}, limit)


def test_a_value_agrees_within_the_spread_and_two_standard_errors_of_the_nearest() -> None:
    def verdict(value: float, **options: Any) -> str:
        given = report(value, **options)
        return next(lines(given, given.card.sections[0])).verdict

    assert verdict(0.512) == "agrees (-0.10)" and verdict(0.545) == "agrees (+2.30)"  # 2.1 + 2 x 0.4 above 52.2
    assert verdict(0.5508) == "agrees (+2.88)" and verdict(0.5512) == "2.92 above the nearest"
    assert verdict(0.560) == "3.80 above the nearest" and verdict(0.480) == "3.30 below the nearest"
    assert verdict(0.480, error=0.02) == "agrees (-3.30)"
    assert verdict(0.512, size="9b") == "20.10 below the nearest"
    assert verdict(0.512, size=None) == "" and verdict(0.512, limit=5) == "a part only: not compared"


def test_a_spread_of_its_own_goes_before_the_cards() -> None:
    row = Row("r", "mmlu", 5, "acc", scale=100.0, published={"s": {"card": 50.0}}, spread={"s": 0.1})
    for spread, said in (({"s": 0.1}, "2.00 above the nearest"), ({}, "agrees (+2.00)")):
        card = Card("c", [Section("n", [replace(row, spread=spread)])], {"card": "w"}, {"s": {}}, {"s": 5.0})
        given = Report(card, "m", "s", {("mmlu", 5): result(value=0.52, error=0.0)})
        assert next(lines(given, card.sections[0])).verdict == said


def test_the_report_says_what_was_published_what_differs_and_why_a_row_is_empty() -> None:
    given = report(0.512)
    text = markdown(given)
    assert "| MMLU | mmlu, 5-shot, acc | 51.20 ± 0.4 | 51.3 | 52.2 | agrees (-0.10) |" in text
    assert "| PIQA | piqa, 0-shot, acc |  | 77.8 | 78.4 | not run yet |" in text
    assert "- AGIEval: card says 3-5-shot; report says 3-5-shot. The harness has the questions without examples" in text
    assert "arXiv:2408.00118" in text and "standard deviation of MMLU over 12 formats" in text
    everything = markdown(report(0.512, size=None))
    assert "card, 2b | report, 2b | card, 9b" in everything and "none of the published sizes" in everything
    assert "Only the first 5 documents" in markdown(report(0.512, limit=5))


def test_the_page_has_a_bar_for_each_value_and_takes_no_markup_from_names() -> None:
    text = in_page(report(0.512))
    assert "<title>measured 51.2</title>" in text and "<title>card 51.3</title>" in text
    assert text.count("<tr") == 2 + 26 and "51.20 ± 0.4" in text and text.count("<rect") == 1 + 2 * 26
    row = Row("<b>x</b>", "t", 5, "acc", scale=100.0, published={"p": {"card": 7.0}})
    made_up = Card("<i>", [Section("<u>", [row])], {"card": "<s>"}, {"p": {}})
    hostile = in_page(Report(made_up, "<em>", "p", {("t", 5): result("t")}, {}, None, ["<q>"], "<a>"))
    assert not any(f"<{tag}>" in hostile for tag in ("b", "i", "u", "s", "em", "q", "a"))


def test_a_row_without_a_metric_shows_every_number_and_a_wrong_metric_says_which_there_are() -> None:
    both = Card("x", [Section("s", [Row("t", "t", 5), Row("t", "t", 5, "f1")])])
    given = Report(both, "m", None, {("t", 5): result("t")})
    found = list(lines(given, both.sections[0]))
    assert [(line.how, line.value) for line in found] == [("t, 5-shot, acc", 0.5), ("t, 5-shot, f1", None)]
    assert found[1].verdict == "no f1 among the task's numbers: acc"
