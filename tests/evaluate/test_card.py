"""Cards: Gemma 2's own, with its published values, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gemma2
from gemma2.evaluate.card import default_card, read_card

CARD: dict[str, Any] = json.loads(default_card().read_text(encoding="utf-8"))


def test_the_model_card_has_its_26_benchmarks_with_two_published_values_for_each_size() -> None:
    card = read_card(default_card())
    assert [(section.name, len(section.rows)) for section in card.sections] == [("pre-trained", 17), ("safety", 9)]
    for row in card.rows:
        assert row.published.keys() == {"2b", "9b", "27b"}
        assert all(by.keys() == {"card", "report"} for by in row.published.values()), row.name
        assert bool(row.task) == (not row.missing) and (not row.task or row.differs), row.name
    pre, safety = (section.rows for section in card.sections)
    other = {size: [row.name for row in pre if len(set(row.published[size].values())) > 1] for size in card.sizes}
    assert len(other["2b"]) == 15 and other["9b"] == [] and other["27b"] == ["DROP"]
    assert all(len(set(row.published[size].values())) == 1 for row in safety for size in card.sizes)
    by_name = {row.name: row for row in card.rows}
    assert by_name["HumanEval"].published["2b"] == {"card": 17.7, "report": 20.1} and by_name["HumanEval"].runs_code
    assert by_name["MMLU"].spread == {"2b": 2.1, "9b": 0.9, "27b": 1.0} == card.spread
    assert [row.name for row in card.rows if row.missing] == ["Winobias 1_2", "Winobias 2_2", "Toxigen"]
    # The report's own averages of its table 13, over all rows.
    for size, average in {"2b": 48.7, "9b": 64.9, "27b": 69.4}.items():
        assert sum(row.published[size]["report"] for row in pre) / 17 == pytest.approx(average, abs=0.06)


def test_a_model_has_the_size_of_its_shape(pocket: gemma2.Gemma) -> None:
    card = read_card(default_card())
    found = {name: card.size_of(gemma2.published_config(f"gemma-2-{name}")) for name in ("2b", "9b", "27b")}
    assert found == {"2b": "2b", "9b": "9b", "27b": "27b"}
    assert card.size_of(pocket.config) is None


def test_a_section_can_be_chosen() -> None:
    card = read_card(default_card())
    assert [section.name for section in card.only(["safety"]).sections] == ["safety"]
    assert card.only([]).rows == card.rows
    with pytest.raises(ValueError, match="no section 'safe'; it has pre-trained, safety"):
        card.only(["safe"])


def changed(**row: Any) -> dict[str, Any]:
    given: dict[str, Any] = json.loads(json.dumps(CARD))
    given["sections"][0]["rows"][0] |= row
    return given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "the file must be an object"),
        ({"name": "x"}, "the file has no sections"),
        ({"name": "x", "sections": []}, "sections must be a list with at least one"),
        (CARD | {"more": 1}, "the file has 'more', which is none of"),
        (changed(task=None), "row 'MMLU' has no task: say why under missing"),
        (changed(task=7), "row 'MMLU': task must be a text, not 7"),
        (changed(metric=None), "row 'MMLU' has no metric"),
        (changed(shots=-1), "row 'MMLU': shots must be a non-negative integer, not -1"),
        (changed(better="more"), "row 'MMLU': better must be"),
        (changed(runs_code="no"), "row 'MMLU': runs_code must be true or false"),
        (changed(scale=0), "row 'MMLU': scale must be a number above 0"),
        (changed(published={"3b": {}}), "row 'MMLU': published has '3b', which is none of 27b, 2b, 9b"),
        (changed(published={"2b": {"cards": 1}}), "published for 2b has 'cards', which is none of card, report"),
        (changed(published={"2b": {"card": "51"}}), "published for 2b: card must be a number"),
        (changed(spread={"2b": float("inf")}), "spread: 2b must be a number that is finite"),
        (CARD | {"sizes": {"2b": {"layers": 26}}}, "size 2b has 'layers', which is none of"),
        (CARD | {"sizes": {"2b": {"hidden_size": "x"}}}, "size 2b: hidden_size must be a number"),
        (CARD | {"spread": 5}, "spread must be an object, not 5"),
        ({"name": "x", "sections": [{"name": "s", "rows": 5}]}, "section 's': rows must be a list"),
        ({"name": "x", "sections": [{"name": "s", "rows": []}]}, "section 's': rows must be a list with at least one"),
        ({"name": "x", "sections": [{"name": 5, "rows": []}]}, "the name of a section must be a text, not 5"),
    ],
)
def test_a_file_that_is_no_card_is_refused_with_the_place(given: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    with pytest.raises(ValueError, match=r"card\.json: ") as error:
        read_card(file)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_json_or_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text('{"name":\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"not JSON: .* in line 2"):
        read_card(file)
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"card\.json: nested too deep"):
        read_card(file)
    file.write_bytes(b'{"name": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8: byte 10 is 0xff"):
        read_card(file)


def test_a_value_that_is_not_known_is_null_and_left_out(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps(changed(published={"2b": {"card": None, "report": 52.2}})), encoding="utf-8")
    assert read_card(file).rows[0].published == {"2b": {"report": 52.2}}


def test_the_page_about_evaluation_has_the_cards_rows() -> None:
    page = (Path(gemma2.__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for row in read_card(default_card()).rows:
        kind = "" if row.filter == "none" else f" ({row.filter})"
        how = f"`{row.task}`, {row.shots}-shot, {row.metric}{kind}" if row.task else "not in the harness"
        both = [list(dict.fromkeys(by.values())) for by in row.published.values()]
        values = " | ".join(", ".join(f"{value:g}" for value in by) for by in both)
        assert f"| {row.name} | {how} | {values} |" in page
