"""Packs: they keep what docs/packs.md says, mistakes are found from them at their place, and rounding passes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma2
from gemma2.cli import main
from gemma2.parity.compare import in_dtype, observed, predicted
from gemma2.parity.judge import DIFFERENCE, EQUAL, ROUNDING
from gemma2.parity.judge_pack import judge_pack, open_port
from gemma2.parity.machine import other_bits
from gemma2.parity.pack import allowance, dumped, make_pack, parse_port, port_of, read_pack
from gemma2.parity.summary import CHUNK, NUMBERS, distance, mix, projected, summarise
from gemma2.parity.trace import About
from gemma2.research import capture
from gemma2.research.sites import chosen, sites
from tests.conftest import LONG, SHAPES, tiny
from tests.parity.injected import BUGS
from tests.parity.packed import PACK, injected_by_pack, pack_of, shipped, shown, sound_by_pack

PAGE = Path(__file__).resolve().parents[2] / "docs" / "packs.md"
NORMS = {"blocks.0.ln1", "blocks.0.hook_attn_out", "blocks.0.ln2", "blocks.0.hook_mlp_out"}
FEW = ("hook_embed", "blocks.0.attn.hook_attn_scores", "blocks.5.hook_resid_post", "logits")
IDS = [2, 17, 5, 99, 300, 7, 45, 12, 8]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model() -> gemma2.Gemma2:
    return tiny("9b").to(torch.bfloat16)


@pytest.fixture(scope="module")
def made(model: gemma2.Gemma2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "golden.json"
    pack_of(model, IDS, path)
    return path


def test_a_word_is_splitmix64_of_its_place() -> None:
    assert [mix(0), mix(1)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert f"mix(0) is 0x{mix(0):X} and mix(1) is 0x{mix(1):X}" in PAGE.read_text(encoding="utf-8")


def test_a_projection_is_the_sum_with_the_signs_of_the_words() -> None:
    value = torch.randn(CHUNK + 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = [0, 1, 77, CHUNK - 1, CHUNK, CHUNK + 2]  # across the seam of two chunks
    value[[i for i in range(CHUNK + 3) if i not in places]] = 0.0
    wanted = [sum((1 if mix(i) >> k & 1 else -1) * value[i].item() for i in places) for k in range(NUMBERS)]
    assert projected(value) == pytest.approx(wanted, abs=1e-12)


def test_the_distance_of_projections_is_that_of_the_values_within_a_quarter_or_so() -> None:
    draw = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(20):
        one = torch.randn(50, 30, generator=draw, dtype=torch.float64)
        other = one + 1e-6 * torch.randn(50, 30, generator=draw, dtype=torch.float64)
        apart = distance(summarise("ln_final", one).projection, summarise("ln_final", other).projection)
        ratios.append(apart / (one - other).norm().item())
    assert min(ratios) > 0.5 and max(ratios) < 1.5 and abs(sum(ratios) / 20 - 1) < 0.07


def test_a_summary_has_the_numbers_of_its_definitions_and_masked_scores_count_as_nothing() -> None:
    value = torch.tensor([[3.0, -4.0], [1.0, -math.inf]])
    seen = summarise("blocks.0.attn.hook_attn_scores", value)
    assert (seen.shape, seen.masked, seen.largest, seen.at) == ((2, 2), 1, 4.0, (0, 1))
    assert seen.rms == pytest.approx(math.sqrt(26 / 4)) and seen.channels == ()
    far = torch.tensor([[-5000.0] * 8])
    plain = summarise("blocks.0.hook_resid_post", far)
    assert plain.masked is None and plain.largest == 5000.0 and len(plain.channels) == NUMBERS
    wanted = [sum((1 if mix(j) >> k & 1 else -1) * 25e6 for j in range(8)) for k in range(NUMBERS)]
    assert plain.channels == pytest.approx(wanted)


@torch.no_grad()
def test_a_model_computes_in_another_dtype_as_a_copy_in_that_dtype_and_is_as_before() -> None:
    for size in SHAPES if LONG else ["9b"]:
        model, tokens = tiny(size).to(torch.bfloat16), torch.tensor([IDS])
        before = model(tokens)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            wanted = observed(copy.deepcopy(model).to(dtype), IDS, names := list(sites(model.config)))
            with in_dtype(model, dtype), capture(model) as seen:
                model(tokens)
            assert all(torch.equal(seen[name][0], wanted[name]) for name in names), (size, dtype)
        assert torch.equal(model(tokens), before) and model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BUGS)
def test_each_injected_mistake_is_found_at_its_place_from_the_pack_that_ships(name: str, pocket: gemma2.Gemma) -> None:
    names = list(sites(pocket.config)) if LONG else shown(BUGS[name], pocket)
    found = injected_by_pack(BUGS[name], pocket, names)
    places = NORMS if name.startswith("1 + w") else {BUGS[name].first}  # made in every norm: the first that shows it
    assert found.verdict == DIFFERENCE and found.first in places


def test_the_same_model_agrees_with_the_pack_that_ships_in_either_dtype(pocket: gemma2.Gemma) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = observed(copy.deepcopy(pocket.model).to(dtype), shipped().ids, FEW)
        stated = port_of("a port", str(dtype).removeprefix("torch."), shipped().ids, values.items())
        found = judge_pack(shipped(), parse_port(Path("port"), stated, shipped()))
        assert found.verdict in (EQUAL, ROUNDING) and len(found.rows) == 4 and found.sites == 180


def test_rounding_is_no_difference_in_random_models(tmp_path: Path) -> None:
    seen = 0
    for name, found in sound_by_pack(tmp_path / "pack.json", 54 if LONG else 2):
        assert found.first is None, f"{name}: {found.first}"
        assert found.verdict == ROUNDING
        seen += 1
    assert seen == (54 if LONG else 2)


def test_the_pack_that_ships_is_what_the_command_makes_of_its_text(pocket: gemma2.Gemma, tmp_path: Path) -> None:
    """The float64 numbers anywhere; the bits where this processor's operations are those of the one that made it."""
    kept = json.loads(PACK.read_text(encoding="utf-8"))
    assert PACK.stat().st_size < 200e3 and len(kept["ids"]) > pocket.config.sliding_window
    (tmp_path / "text").write_text(kept["text"], encoding="utf-8")
    globs = [part for site in (["*"] if LONG else FEW) for part in ("--sites", site)]
    argv = ["trace", "pocket", "--file", str(tmp_path / "text"), "--pack", str(tmp_path / "again.json"), *globs]
    assert main(argv) == 0
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again["ids"] == kept["ids"] and again["config"] == kept["config"] and again["dtype"] == "bfloat16"
    assert list(again["sites"]) == (list(kept["sites"]) if LONG else list(FEW))
    assert list(kept["sites"]) == list(sites(pocket.config))
    same = not other_bits(kept["versions"], pocket.config, len(kept["ids"]), torch.bfloat16)
    for name, site in again["sites"].items():
        old = kept["sites"][name]
        assert (site["shape"], site["at"], site.get("masked")) == (old["shape"], old["at"], old.get("masked")), name
        length = old["rms"] * math.sqrt(math.prod(old["shape"]))
        for key in ("rms", "max", "projection", "channels"):
            if key in old:
                power = length**2 if key == "channels" else length
                assert site[key] == pytest.approx(old[key], abs=1e-8 * power), (name, key)
        assert site["error"] == pytest.approx(old["error"], rel=0.5, abs=1e-6)
        assert not same or site["bits"] == old["bits"], name


def test_an_allowance_is_the_stated_multiple_of_our_own_error(model: gemma2.Gemma2, made: Path) -> None:
    pack = json.loads(made.read_text(encoding="utf-8"))
    name = "blocks.1.mlp.hook_post"
    site, truth, own = pack["sites"][name], predicted(model, IDS)[name], observed(model, IDS, [name])[name].double()
    length, n = truth.norm().item(), truth.numel()
    relative = (own - truth).norm().item() / length
    assert site["error"]["bfloat16"] == pytest.approx(relative, rel=1e-2)
    assert site["allowed"]["bfloat16"][0] == pytest.approx(2 * relative * (1 + 4 / math.sqrt(n)) * length, rel=1e-3)
    change = (own.double().square().sum(0) - truth.square().sum(0)).norm().item()
    assert site["allowed"]["bfloat16"][1] == pytest.approx(2.5 * change, rel=1e-3)
    left = 2 * 1e-4 * (1 + 4 / math.sqrt(n)) / math.sqrt(len(IDS)) * truth.square().sum(0).norm().item()
    exact, allowed = allowance(name, truth, truth, 1e-4)
    assert exact == 0 and allowed == pytest.approx([2e-4 * (1 + 4 / math.sqrt(n)) * length, 2.5 * left], rel=1e-3)


def test_the_reader_on_the_page_agrees_with_ours_and_needs_numpy_alone(model: gemma2.Gemma2, made: Path) -> None:
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 30 and "torch" not in code and "gemma2" not in code
    page: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), page)
    pack = json.loads(made.read_text(encoding="utf-8"))
    assert page["signs"](3).tolist() == [[1 if mix(i) >> k & 1 else -1 for k in range(NUMBERS)] for i in range(3)]
    values = {name: value.float().numpy() for name, value in observed(model, IDS, sites(model.config)).items()}
    assert list(page["differences"](pack, "bfloat16", values)) == []
    values["blocks.2.attn.hook_z"] = np.ascontiguousarray(values["blocks.2.attn.hook_z"][:, ::-1])  # heads reversed
    (wrong,) = page["differences"](pack, "bfloat16", values)
    assert wrong[:2] == ("blocks.2.attn.hook_z", "projection") and wrong[2] > 10


# The command.


def test_a_ports_file_is_judged_and_the_first_site_that_differs_is_named(
    model: gemma2.Gemma2, made: Path, tmp_path: Path, capsys: Capture
) -> None:
    values = observed(model, IDS, ["hook_embed", "blocks.1.attn.hook_rot_q", "blocks.1.hook_resid_post", "logits"])
    port = tmp_path / "port.json"
    port.write_text(json.dumps(port_of("my port", "bfloat16", IDS, values.items())), encoding="utf-8")
    assert main(["parity", str(made), "--against", str(port)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"PACK   {made}, by ours", f"PORT   {port}, my port, in bfloat16"]
    assert out[-1] == "verdict: equal to the bit (4 of 4 sites equal ours in every bit)"
    name = "blocks.1.attn.hook_rot_q"
    values[name], values["logits"] = values[name].flip(-1), values["logits"] * 2
    port.write_text(json.dumps(port_of("my port", "bfloat16", IDS, values.items())), encoding="utf-8")
    assert main(["parity", str(made), "--against", str(port)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"verdict: difference, first at {name}: ")
    assert "right sizes in other places" in out[-1] and out[-1].endswith(
        "so does 1 site after it, perhaps for no other reason"
    )
    assert main(["parity", str(made), "--against", str(port), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["first"], len(found["rows"])) == ("difference", name, 4)
    assert [row["site"] for row in found["rows"] if row["differs"]] == [name, "logits"]


def test_a_trace_and_a_model_are_compared_with_a_pack(tmp_path: Path, capsys: Capture) -> None:
    ids = ",".join(map(str, shipped().ids))
    trace = tmp_path / "trace.safetensors"
    assert main(["trace", "pocket", "--ids", ids, "-o", str(trace), "--sites", "ln_final", "--device", "cpu"]) == 0
    for port in (str(trace), "self:model=pocket"):
        capsys.readouterr()
        assert main(["parity", "pocket:pack.json", "--against", port, "--sites", "ln_final"]) == 0
        assert "1 of 180" in capsys.readouterr().out
    quantized = "self:model=pocket:pocket-q8_0.gguf,dtype=float32"
    assert main(["parity", "pocket:pack.json", "--against", quantized, "--sites", "ln_final"]) == 1


def test_what_is_not_finite_differs_where_it_arises(made: Path, model: gemma2.Gemma2) -> None:
    values = observed(model, IDS, ["hook_embed", "ln_final"])
    values["ln_final"][3, 4] = torch.nan
    stated = json.loads(json.dumps(port_of("p", "bfloat16", IDS, values.items()), allow_nan=False))
    pack = read_pack(made)
    found = judge_pack(pack, parse_port(Path("p"), stated, pack))
    assert found.first == "ln_final" and found.rows[-1].why == "values are not finite"
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_number_beyond_all_bounds_differs_and_does_not_stop_the_comparison(made: Path) -> None:
    pack, stated = read_pack(made), json.loads(made.read_text(encoding="utf-8"))
    stated["sites"]["ln_final"]["projection"][5] = 1e308
    found = judge_pack(pack, parse_port(Path("p"), stated, pack))
    assert found.first == "ln_final" and not found.rows[0].differs


def test_a_port_that_leaves_out_what_a_pack_judges_by_is_refused(made: Path) -> None:
    pack, stated = read_pack(made), json.loads(made.read_text(encoding="utf-8"))
    for name, key in (("ln_final", "channels"), ("blocks.0.attn.hook_attn_scores", "masked")):
        port = copy.deepcopy(stated)
        del port["sites"][name][key], port["sites"][name]["allowed"]
        with pytest.raises(gemma2.BadModelFile, match=rf"^port: {name} does not state {key}, by which"):
            parse_port(Path("port"), port, pack)


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def made_of(pack: dict[str, Any]) -> dict[str, Any]:
        new = copy.deepcopy(pack)
        change(new)
        return new

    return made_of


FAULTS = {
    "does not say format": broken(lambda p: p.update(format="gemma2-pack 9")),
    "must state config": broken(lambda p: p.pop("config")),
    "ids must be a list of token ids": broken(lambda p: p.update(ids=[2, 512])),
    "dtype 'int8' is not one of": broken(lambda p: p.update(dtype="int8")),
    "'blocks.9.ln1' is not a site": broken(lambda p: p["sites"].update({"blocks.9.ln1": {}})),
    "does not state rms": broken(lambda p: p["sites"]["ln_final"].pop("rms")),
    "is [9, 7], and its ids and config make it [9, 112]": broken(lambda p: p["sites"]["ln_final"].update(shape=[9, 7])),
    "ln_final: projection must be a list of 32 numbers": broken(
        lambda p: p["sites"]["ln_final"].update(projection=[1.0] * 31)
    ),
    "ln_final: channels holds something that is not a number": broken(
        lambda p: p["sites"]["ln_final"].update(channels=["a"] * 32)
    ),
    "dtype '[]' is not one of": broken(lambda p: p.update(dtype=[])),
    "at must be a list of whole numbers": broken(lambda p: p["sites"]["ln_final"].update(at=5)),
    "ln_final: rms holds a number beyond float64": broken(lambda p: p["sites"]["ln_final"].update(rms=10**400)),
    "must be a JSON object": broken(lambda p: p.update(sites=[])),
    "this is a port's file": broken(lambda p: p["sites"]["ln_final"].pop("allowed")),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_damaged_pack_is_refused_in_one_line_that_says_where(said: str, made: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(FAULTS[said](json.loads(made.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(gemma2.BadModelFile) as caught:
        read_pack(path)
    line = str(caught.value)
    assert said in line and line.startswith(str(path)) and "\n" not in line and len(line) < 400


def test_what_cannot_be_compared_or_made_is_refused(made: Path, tmp_path: Path, capsys: Capture) -> None:
    def complaint(*argv: object, code: int) -> str:
        assert main(list(map(str, argv))) == code
        return capsys.readouterr().err

    port = tmp_path / "port.json"
    stated = {"format": "gemma2-pack 1", "dtype": "float16", "sites": {"ln_final": {}}}
    site = json.loads(made.read_text(encoding="utf-8"))["sites"]["ln_final"]
    port.write_text(json.dumps(stated | {"sites": {"ln_final": site}}), encoding="utf-8")
    assert "no errors of float16" in complaint("parity", made, "--against", port, code=2)
    port.write_text(json.dumps(stated | {"sites": {"ln_final": site}, "ids": [2, 3]}), encoding="utf-8")
    assert "its ids are not those of" in complaint("parity", made, "--against", port, code=2)
    assert "a pack holds no weights" in complaint("parity", made, "--against", "self:dtype=float32", code=2)
    assert "is compared with port.json" in complaint("parity", made, "--against", "transformers", code=2)
    for option in (["--prompt", "a"], ["--gradients"], ["--no-cases"], ["--revision", "main"]):
        assert f"leave out {option[0]}" in complaint("parity", made, "--against", port, *option, code=2)
    assert "another model than that of" in complaint("parity", made, "--against", "self:model=pocket", code=2)
    assert "no such file" in complaint("parity", tmp_path / "no.json", "--against", port, code=2).lower()
    assert "is there already" in complaint("trace", "pocket", "--prompt", "a", "--pack", made, code=1)
    pack = tmp_path / "p.json"
    assert "give one of them" in complaint("trace", "pocket", "--prompt", "a", "--pack", pack, "-o", port, code=2)
    assert "leave out --weights" in complaint(
        "trace", "pocket", "--prompt", "a", "--pack", pack, "--weights", "int8", code=2
    )
    with pytest.raises(ValueError, match="no site is called 'logit'"):
        judge_pack(read_pack(made), open_port(str(made), read_pack(made)), "logit")
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0] = torch.inf
    with pytest.raises(gemma2.NonFiniteError, match=r"blocks\.1\.mlp\.hook_pre_linear is not finite"):
        make_pack(model, IDS, About("x", "float32", model.config))
    with pytest.raises(ValueError, match=r"token id 512 is outside the vocabulary \[0, 512\)"):
        make_pack(tiny(), [2, 512], About("x", "float32", model.config))
    assert not pack.exists()


def test_a_pack_has_a_line_for_each_site_and_keeps_its_size_for_any_text(model: gemma2.Gemma2, made: Path) -> None:
    text = made.read_text(encoding="utf-8")
    assert sum(line.startswith('  "') for line in text.splitlines()) == len(sites(model.config))
    about = About("ours", "bfloat16", model.config)
    names = list(chosen(model.config, "blocks.*.hook_resid_post"))
    long = dumped(make_pack(model, IDS * 9, about, names))
    few = dumped(make_pack(model, IDS, about, names))
    assert len(long) < len(few) * 1.1
