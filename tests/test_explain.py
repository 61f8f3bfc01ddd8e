"""The page that shows a whole forward pass: its numbers are the captured ones, and it works from a file."""

from __future__ import annotations

import base64
import html
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gemma2
from gemma2 import model as model_file
from gemma2 import ops, tokenizer
from gemma2.cli import main
from gemma2.load import POCKET
from gemma2.pictures.explain import explain
from gemma2.pictures.explain.panels import AFTER, BEFORE, IN_LAYER, Panel, in_layer
from gemma2.pictures.explain.run import ENDS
from gemma2.research import capture
from gemma2.research.sites import TABLE, sites
from tests.browser import needs_browser, opened, sideways
from tests.conftest import tiny

HOSTILE = 'A <b>bold</b> <script>alert(1)</script> & "quoted" </script> text,\nin two lines'
TEXT = "In the beginning God created the heaven and the earth."


@pytest.fixture(scope="module")
def window(pocket: gemma2.Gemma) -> gemma2.Gemma:
    """A model in which a text of 60 tokens is longer than the window of 16."""
    return gemma2.Gemma(tiny("27b", vocab_size=4096).double(), pocket.tokenizer)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def array(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


def captured(gemma: gemma2.Gemma, text: str) -> tuple[Any, list[int]]:
    ids = gemma.tokenizer.encode(text)
    with torch.no_grad(), capture(gemma.model) as seen:
        gemma.model(torch.tensor([ids]))
    return seen, ids


def panels_of(dom: str) -> dict[str, str]:
    """The HTML of each panel by its id."""
    parts = re.split(r'<section class="panel" id="([^"]+)"', dom)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def shown(panel: str) -> list[float]:
    """The first values that a panel says, as the script wrote them."""
    found = re.search(r'<code class="values">(.*?)</code>', panel)
    assert found
    return [float(one.replace("\N{MINUS SIGN}", "-")) for one in found[1].split() if one != "hidden"]


@needs_browser
def test_the_page_works_from_a_file_and_every_site_of_the_chosen_layers_has_a_panel_with_the_captured_numbers(
    pocket: gemma2.Gemma, tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(explain(pocket, HOSTILE), encoding="utf-8")
    dom, said = opened(file, tmp_path / "browser")
    assert said == []
    seen, _ = captured(pocket, HOSTILE)
    panels = panels_of(dom)
    expected = [
        name for name in sites(pocket.config) if not name.startswith("blocks.") or name.split(".")[1] in ("0", "1")
    ]
    assert [name for name in panels if name in sites(pocket.config)] == expected
    for name in expected:
        value = seen[name][0].double()
        row = value[0, -1] if sites(pocket.config)[name].shape.startswith("b h t s") else value[-1]
        numbers = shown(panels[name])
        assert len(numbers) == min(6, row.numel())
        assert numbers == pytest.approx(row.flatten()[: len(numbers)].tolist(), rel=6e-4), name
    assert "<b>bold</b>" not in dom and "<script>alert" not in dom
    assert html.escape("<script>alert(1)</script>", quote=False) in dom.split("</title>")[0]
    assert "BOS, id 2" in panels["tokens"]
    best = seen["logits"][0, -1].softmax(-1).topk(10)
    rows = re.findall(r'<td class="number">(.*?)</td>', panels["next"])
    assert [int(one) for one in rows[::5]] == best.indices.tolist()
    assert [float(one) for one in rows[3::5]] == pytest.approx(best.values.tolist(), rel=6e-3)
    assert dom.count("<details ") == pocket.config.num_hidden_layers - 2
    assert set(panels) <= set(re.findall(r'<a [^>]*href="#([^"]+)"', dom.split("<main>")[0]))  # the side's navigation


@needs_browser
def test_a_long_text_says_what_is_drawn_the_mask_is_of_all_tokens_and_keys_choose_a_token_and_a_head(
    window: gemma2.Gemma, tmp_path: Path
) -> None:
    ids = list(range(100, 160))
    file = tmp_path / "page.html"
    pressed = "".join(f'dispatchEvent(new KeyboardEvent("keydown", {{key: "{key}"}}));' for key in ("ArrowLeft", "]"))
    page = explain(window, ids, [2, 3])
    file.write_text(page.replace("</body>", f"<script>{pressed}</script></body>"), encoding="utf-8")
    dom, said = opened(file, tmp_path / "browser")
    assert said == []
    assert f"The text has 60 tokens. The first and the last {ENDS} are drawn; the 12 between them" in dom
    panels = panels_of(dom)
    assert "sees 16 keys: positions 43 to 58" in re.sub("<.*?>", "", panels["blocks.2.mask"])
    assert "sees 59 keys: positions 0 to 58" in re.sub("<.*?>", "", panels["blocks.3.mask"])
    assert "12 more" in panels["tokens"]
    assert "Lengths in the lines of the other layers, and the numbers in their tables, are of the drawn tokens." in dom
    assert all("most on, of the drawn tokens" in panels[f"blocks.{layer}.attn.hook_pattern"] for layer in (2, 3))
    assert "BOS, id" not in panels["tokens"]  # these ids have none
    with torch.no_grad(), capture(window.model, "blocks.3.attn.hook_z") as seen:
        window.model(torch.tensor([ids]))
    assert shown(panels["blocks.3.attn.hook_z"]) == pytest.approx(
        seen["blocks.3.attn.hook_z"][0, 58, 1, :6].tolist(), rel=6e-4
    )


@needs_browser
def test_the_page_fits_a_narrow_window(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(explain(pocket, [2, *range(500, 560)]), encoding="utf-8")
    assert sideways(file, tmp_path / "browser") == 0


def test_masks_shares_and_nearness_to_the_cap_are_those_of_the_pass(window: gemma2.Gemma) -> None:
    ids = torch.arange(100, 160)[None]
    found = data_of(explain(window, ids[0].tolist()))["scores"]
    with torch.no_grad(), capture(window.model, "blocks.*.attn.hook_scores_raw") as seen:
        window.model(ids)
    places = torch.arange(60)[None]
    for layer in range(4):
        visible = ops.visible(places, places, window.config.window(layer))[0, 0]
        mine = found[str(layer)]
        keys = torch.zeros_like(visible)
        for query, (first, count) in enumerate(zip(mine["first"], mine["count"], strict=True)):
            keys[query, first : first + count] = True
        assert torch.equal(keys, visible)
        assert mine["seen"] == pytest.approx(float(visible.sum()) / (60 * 61 / 2))
        raw = seen[f"blocks.{layer}.attn.hook_scores_raw"][0][:, visible]
        assert abs(mine["most"]) == float(raw.abs().max()) > 40  # so the cap bites
        head, query, key = mine["at"]
        assert float(seen[f"blocks.{layer}.attn.hook_scores_raw"][0, head, query, key]) == mine["most"]
        assert visible[query, key]
        assert mine["half"] == pytest.approx(float((raw.abs() > 25).double().mean())) and mine["half"] > 0
        assert sum(mine["bins"]) == raw.numel()


def test_arrays_in_the_page_are_the_captured_values_to_the_bit(pocket: gemma2.Gemma) -> None:
    seen, ids = captured(pocket, TEXT)
    data = data_of(explain(pocket, TEXT, [2, 5]))
    assert [one["id"] for one in data["tokens"]] == ids and ids[0] == 2
    t, names = len(ids), sites(pocket.config)
    for name, held in data["sites"].items():
        if name in ("rows", "stream"):
            continue
        value = seen[name][0]
        expected = value if names[name].shape == "b h t s" else value[..., : held["width"]]
        assert torch.equal(array(held["v"]), expected.flatten()), name
        if "length" in held:
            assert torch.allclose(array(held["length"]), value.norm(dim=-1), rtol=1e-6)
            place = held["place"][-1]
            assert place[0] == int(value[-1].abs().argmax()) and value[-1][place].tolist() == pytest.approx(
                array(held["largest"]).view(t, -1)[-1].tolist()
            )
    rows = pocket.model.model.embed_tokens.weight[ids]
    assert torch.equal(array(data["sites"]["rows"]["v"]).view(t, -1), rows[:, :64])
    chances = torch.softmax(seen["logits_raw"][0].double(), -1)
    best = torch.tensor(data["next"]["ids"])
    assert torch.allclose(array(data["next"]["bare"]).view(t, -1), chances.gather(-1, best).float())


def test_the_gains_and_the_turned_pairs_are_the_models(pocket: gemma2.Gemma) -> None:
    seen, ids = captured(pocket, TEXT)
    held = data_of(explain(pocket, TEXT))["sites"]
    gain = 1 + pocket.model.get_parameter("model.layers.1.post_attention_layernorm.weight").detach()
    assert torch.equal(array(held["blocks.1.hook_attn_out"]["gain"]), gain[:64])
    assert held["blocks.1.hook_attn_out"]["most"] == float(gain.max())
    turned = held["blocks.1.attn.hook_rot_k"]
    points = array(turned["after"]).view(len(ids), 4, len(turned["pairs"]), 2)
    key = seen["blocks.1.attn.hook_rot_k"][0]
    for number, pair in enumerate(turned["pairs"]):
        assert torch.equal(points[:, :, number], key[..., [pair, pair + turned["half"]]])
    before = array(turned["before"]).view(points.shape)
    assert torch.equal(before[0], points[0]) and not torch.equal(before[1], points[1])  # position 0 is not turned


def test_every_site_has_words_and_every_quoted_line_stands_in_its_class() -> None:
    panels: list[Panel] = [*BEFORE, *IN_LAYER, *AFTER]
    assert [panel.name for panel in panels if panel.name in {site.name for site in TABLE}] == [
        site.name for site in TABLE
    ]
    for panel in panels:
        owner = getattr(tokenizer if panel.owner == "Tokenizer" else model_file, panel.owner)
        assert panel.line and panel.line in inspect.getsource(owner), panel.name
    placed = {panel.name for panel in in_layer(3)}
    assert all(one in placed for panel in in_layer(3) for one in panel.beside)


def test_a_piece_of_the_vocabulary_that_is_html_stays_text(
    pocket: gemma2.Gemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("data", "markup"):
        monkeypatch.setattr(f"gemma2.pictures.explain.{file}.readable", lambda *_: "</script><b>x</b>")
    page = explain(pocket, "In", name="<b>model</b>", foot="<b>foot</b>")
    assert data_of(page)["tokens"][0]["text"] == "</script><b>x</b>"
    assert "<b>x</b>" not in page and "<b>model</b>" not in page and "<b>foot</b>" not in page


def test_nothing_is_fetched(pocket: gemma2.Gemma) -> None:
    page = explain(pocket, TEXT)
    assert not re.search(r'(src|href)="(?!#)|url\(|@import|fetch\(|XMLHttp', page)
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "fast": True},
        pytest.param({"weights": "int8"}, marks=pytest.mark.long),  # its products are compiled first, as are the next
        pytest.param(
            {"source": POCKET / "pocket-q8_0.gguf", "weights": "packed", "fast": True}, marks=pytest.mark.long
        ),
    ],
    ids=["fast", "int8", "packed and fast"],
)
def test_faster_parts_and_packed_weights_are_shown_as_they_compute_and_the_model_stays_as_it_is(
    options: dict[str, Any],
) -> None:
    gemma = gemma2.load(**options, device="cpu")
    parts = dict(gemma.model.named_modules())
    data = data_of(explain(gemma, TEXT))
    assert dict(gemma.model.named_modules()) == parts
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gemma.model.modules())
    seen, ids = captured(gemma, TEXT)
    for name in ("hook_embed", "blocks.1.hook_resid_post", "ln_final"):
        assert torch.equal(array(data["sites"][name]["v"]), seen[name][0, :, :64].float().flatten())
    assert data["next"]["ids"] == seen["logits"][0].double().topk(10).indices.tolist()
    rows = array(data["sites"]["rows"]["v"]).view(len(ids), -1)
    assert torch.equal(rows * data["scale"], array(data["sites"]["hook_embed"]["v"]).view(len(ids), -1))


def test_a_value_that_is_not_finite_is_named(pocket: gemma2.Gemma) -> None:
    gemma = gemma2.Gemma(tiny(vocab_size=4096), pocket.tokenizer)
    with torch.no_grad():
        gemma.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(gemma2.NonFiniteError, match=r"^blocks\.1\.mlp\.hook_pre_linear was computed as NaN"):
        explain(gemma, TEXT)


def test_an_error_inside_the_pass_leaves_no_hook(pocket: gemma2.Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.pictures.explain.run._scores", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(pocket, TEXT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pocket.model.modules())


def test_a_text_of_nothing_is_the_bos_alone(pocket: gemma2.Gemma) -> None:
    data = data_of(explain(pocket, ""))
    assert [one["id"] for one in data["tokens"]] == [2] and data["scores"]["0"]["count"] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0,6"], "there is no layer 6: this model has layers 0 to 5"),
        (["--layers", "1,1"], "layers must be at least one, and none twice, not [1, 1]"),
        (["--layers", "one"], "--layers 'one': must be numbers of layers from 0, as 0,1"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", TEXT, "-o", str(tmp_path / "page.html"), *options]) == 2
    assert capsys.readouterr().err == f"gemma2: error: {message}\n" and not list(tmp_path.iterdir())


def test_the_command_writes_the_page_and_replaces_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    command = ["explain", TEXT, "-o", str(file), "--dtype", "float32", "--device", "cpu"]
    assert main(command) == 0
    assert re.fullmatch(rf"{re.escape(str(file))}: \d+ kB\n", capsys.readouterr().out)
    first = file.read_text(encoding="utf-8")
    assert "pocket, float32; gemma2 " in first
    assert main([*command, "--model", "no-such-model"]) == 1
    assert "is there already" in capsys.readouterr().err  # before the model is looked for
    assert main([*command, "--force"]) == 0 and file.read_text(encoding="utf-8") == first


def test_a_text_longer_than_the_context_is_refused(pocket: gemma2.Gemma) -> None:
    with pytest.raises(gemma2.ContextOverflow, match=r"1,025 tokens exceed the model's context of 1,024"):
        explain(pocket, [2] * 1025)
