"""The page about speed is printed from the recorded runs, and shows what is in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import performance_page
import pytest

from gemma2.cli.bench import LIMITS

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "docs" / "performance").glob("*.json"))


@pytest.fixture
def record() -> dict[str, Any]:
    """A made-up run of two systems, in round numbers: the first decodes 10 tokens a second, the other 5."""
    model = {
        "parameters": 5_000_000_000,
        "num_hidden_layers": 2,
        "local_layers": 1,
        "hidden_size": 1000,
        "intermediate_size": 2000,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 100,
        "vocab_size": 1000,
        "sliding_window": 64,
    }
    memory = {"before": 10**8, "loading": 11 * 10**8, "loaded": 10**9, "peak": 21 * 10**8, "resident": 10**9}
    systems = [
        {
            "name": name,
            "kind": name,
            "options": {},
            "seconds": [seconds, seconds],
            "first_token": [2.5, 3.5],
            "first_step": 0.1,
            "weights": 10**9,
            "cache_bytes": 2,
            "memory": memory,
            "versions": {name: "1.0", "torch": "2.0"},
            "notes": [],
        }
        for name, seconds in (("gemma2", 0.5), ("other", 1.5))
    ]
    case = {"seconds": {"gemma2": [[0.1, 0.1, 0.9], [0.1, 0.1, 0.1]], "other": [[0.2, 0.2, 0.2], [0.25, 0.2, 0.1]]}}
    cases = [
        {"context": context, "filled": context, "batch": batch, "filling": {"gemma2": 1.0, "other": 1.0}, **case}
        for context, batch in ((128, 1), (1024, 1), (128, 4))
    ]
    machine = {
        "system": "Linux x86_64",
        "processor": "a processor (avx2)",
        "cores": "4",
        "device": "cpu (AVX2)",
        "torch": "2.0",
        "python": "3.11.0",
        "threads": "2",
    }
    return {
        "gemma2 bench": 1,
        "date": "2026-01-02",
        "command": "gemma2 bench made-up",
        "gemma2": "1.0",
        "name": "made-up",
        "load_before": [0.5, 0.5, 0.5],
        "plan": {},
        "model": model,
        "systems": systems,
        "agreement": [{"system": "other", "distance": 0.0123, "allowed": 0.06, "largest": 0.1, "top": 5, "steps": 5}],
        "machine": machine,
        "prefill": [{"tokens": 100, "seconds": {"gemma2": [0.5, 0.5], "other": [1.0, 2.0]}}],
        "decode": cases,
        "limits": {name: [20.0, 22.0] for name in LIMITS},
        "load_after": [1.5, 1.0, 0.5],
    }


def test_the_page_shows_rates_shares_and_ratios(record: dict[str, Any]) -> None:
    page = performance_page.page([record])
    assert "## made-up: gemma2 beside other\n\n    gemma2 bench made-up\n" in page
    assert "2026-01-02; 5,000,000,000 parameters in 2 layers; a processor (avx2), 2 of 4 cores, cpu (AVX2)" in page
    assert "load of the machine before and after: 0.5, 1.5." in page
    assert "| memory read, one long sum | 21 (20-22) GB/s |" in page
    assert "| gemma2 | 0.5 (0.5-0.5) | 3 (2.5-3.5) | 1 GB | 1 GB | 2 GB |" in page
    assert "by their spread: other 0.012." in page
    # 1 GB and 2 x 200 x 2 bytes x (64 + 128 columns) at 21 GB/s are 0.0476 s, of 0.1 s.
    assert "| decode at 128 | gemma2 | 10 (10-10) | 0.48 of read |  |" in page
    assert "|  | other | 5 (5-5) | 0.24 of read | 2.00 (2.00-2.00) x |" in page
    assert "| decode at 128, 4 rows | gemma2 | 40 (40-40) |" in page
    assert "| prefill 100 | gemma2 | 200 (200-200) |" in page and "3.00 (2.00-4.00) x |" in page
    assert "| decode, tokens/s, by columns | 128 | 1,024 |" in page and "| other | 5 | 5 |" in page
    assert "| decode, tokens/s, by rows | 1 | 4 |" in page and "| gemma2 | 10 | 40 |" in page


def test_a_run_without_a_sweep_or_a_peer_has_no_table_for_them(record: dict[str, Any]) -> None:
    small = copy.deepcopy(record)
    small["systems"], small["agreement"], small["load_before"] = small["systems"][:1], [], None
    small["decode"] = small["decode"][:1]
    for case in (*small["prefill"], *small["decode"]):
        del case["seconds"]["other"]
    page = performance_page.page([small])
    assert "## made-up: gemma2\n" in page and "by columns" not in page and "Distance" not in page.split("## How")[0]


def test_the_chart_names_every_system(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, *_ = record["decode"]
    record["decode"] += [{**first, "context": 4096, "filled": 4096}, {**first, "batch": 8}]  # three points each
    performance_page.draw([record], tmp_path / "chart.svg")
    chart = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert chart.lstrip().startswith("<?xml") and chart.count("other") >= 3
    for text in ("gemma2  (made-up)", "columns in the cache", "rows decoded together", "1,024"):
        assert text in chart
    performance_page.draw([record], tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "chart.svg").read_bytes()


def test_a_remark_in_a_record_stands_above_its_figures(record: dict[str, Any]) -> None:
    page = performance_page.page([{**record, "remark": "The machine was busy."}])
    assert page.index("The machine was busy.") < page.index("| limit of the machine")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gemma2 bench": 0}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"run\.json: not a record that gemma2 bench --json has written"):
        performance_page.read(path)


def test_the_page_in_docs_is_the_one_that_the_recorded_runs_give() -> None:
    assert RECORDS
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS]
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == performance_page.page(records)
    assert (ROOT / "docs" / "performance.svg").is_file()
