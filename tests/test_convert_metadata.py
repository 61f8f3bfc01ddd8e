"""What is converted says the same of itself: its numbers, its words, chat; and the command that converts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gemma2
from gemma2.checkpoints.checkpoint import open_checkpoint
from gemma2.checkpoints.hf_config import read_config
from gemma2.cli import main
from gemma2.config import GLOBAL, LOCAL
from gemma2.convert import convert
from gemma2.load import POCKET
from tests.gguf_files import tiny_model
from tests.hostile.conftest import SMALL
from tests.test_convert import TARGETS, Make, model_folder
from tests.test_tokenizer import space_prefixed

TEXTS = [
    "In the beginning",
    "",
    "  two  spaces\n\n\ttab",
    "日本語 café 🙂 \x00",
    "<start_of_turn>user\n<b>hi</b>",
    "1234567",
]


@pytest.fixture
def source(tmp_path: Path) -> Make:
    return partial(model_folder, tmp_path / "source")


# The numbers.

CONFIGS: dict[str, dict[str, Any]] = {
    "27B": {"num_hidden_layers": 46, "query_pre_attn_scalar": 2},  # width // heads, and not the width of a head
    "all local": {"layer_types": [LOCAL, LOCAL]},
    "all global": {"layer_types": [GLOBAL, GLOBAL]},
    "every third global": {"num_hidden_layers": 5, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL]},
    "the last global": {"num_hidden_layers": 3, "layer_types": [LOCAL, LOCAL, GLOBAL]},
    "one layer": {"num_hidden_layers": 1, "layer_types": [LOCAL]},
    "window and context": {"sliding_window": 7, "max_position_embeddings": 77},
    "caps": {"attn_logit_softcapping": 12.1, "final_logit_softcapping": 0.3},
    "eps and theta": {"rms_norm_eps": 1.3e-5, "rope_theta": 1234567.0},
    "integers for floats": {"attn_logit_softcapping": 50, "rope_theta": 10000},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CONFIGS)
def test_every_number_of_the_config_survives(case: str, source: Make, tmp_path: Path) -> None:
    place = source(**CONFIGS[case])
    config = open_checkpoint(place).config
    for name in TARGETS.values():
        made = convert(place, tmp_path / name, progress=False)
        assert open_checkpoint(made.path).config == config, name
        assert not [note for note in made.notes if "float32 for it" in note]


def test_a_number_with_more_digits_than_float32_is_said_to_lose_them(source: Make, tmp_path: Path) -> None:
    made = convert(source(rope_theta=10000.000123), tmp_path / "out.gguf", progress=False)
    assert "rope_theta 10000.000123 is 10000.0 in a GGUF, which has float32 for it" in made.notes
    assert open_checkpoint(made.path).config.rope_theta == 10000.0


UNSTATED: dict[str, dict[str, Any]] = {
    "a query scale of 2 layers": {"query_pre_attn_scalar": 2},
    "a query scale of 46 layers": {"num_hidden_layers": 46, "query_pre_attn_scalar": 4},
    "a first global layer": {"num_hidden_layers": 3, "layer_types": [GLOBAL, LOCAL, LOCAL]},
    "a pattern that does not repeat": {"num_hidden_layers": 4, "layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL]},
}


@pytest.mark.parametrize("case", UNSTATED)
def test_what_llama_cpp_would_run_otherwise_is_not_written_as_gguf(case: str, source: Make, tmp_path: Path) -> None:
    place = source(**UNSTATED[case])
    with pytest.raises(
        gemma2.BadModelFile, match=r"query_pre_attn_scalar is .* a GGUF cannot state|cannot state this pattern"
    ):
        convert(place, tmp_path / "out.gguf", progress=False)
    assert list(tmp_path.iterdir()) == [place]
    config = open_checkpoint(place).config
    assert open_checkpoint(convert(place, tmp_path / "out", progress=False).path).config == config


# The words.

TEMPLATE = "{{ bos_token }}{% for message in messages %}é日{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("end", TARGETS)
@pytest.mark.parametrize("start", TARGETS)
def test_texts_have_the_same_ids_afterwards(start: str, end: str, source: Make, tmp_path: Path) -> None:
    before = gemma2.Tokenizer.from_file(POCKET / "tokenizer.model")
    (tmp_path / "first").mkdir()
    first = convert(source(), tmp_path / "first" / TARGETS[start], progress=False).path
    after = open_checkpoint(convert(first, tmp_path / TARGETS[end], progress=False).path).tokenizer
    for text in TEXTS:
        for special in (True, False):
            ids = before.encode(text, special=special)
            assert after.encode(text, special=special) == ids
            assert after.decode(ids) == before.decode(ids)
    assert after.special == before.special


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["no template", "template"])
@pytest.mark.parametrize("tuned", [True, False])
def test_what_is_said_about_chat_survives(tuned: bool, template: str | None, source: Make, tmp_path: Path) -> None:
    place = source()
    (place / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 107] if tuned else 1}), encoding="utf-8"
    )
    if template:
        (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in TARGETS.values():
        first = convert(place, tmp_path / name, progress=False).path
        again = convert(first, tmp_path / f"again-{name}", progress=False).path
        for path in (first, again):
            opened = open_checkpoint(path)
            assert (opened.chat_tuned, opened.chat_template) == (tuned, template), path
        for beside in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"):
            (tmp_path / beside).unlink(missing_ok=True)


def test_what_does_not_say_whether_it_was_tuned_for_chat_does_not_afterwards(source: Make, tmp_path: Path) -> None:
    place = source()
    for name in TARGETS.values():
        opened = open_checkpoint(convert(place, tmp_path / name, progress=False).path)
        assert opened.chat_tuned is None and opened.chat_template is None


def test_a_given_tokenizer_takes_the_place_of_the_sources(source: Make, tmp_path: Path) -> None:
    place = source()
    (place / "tokenizer.model").unlink()
    for name in TARGETS.values():
        made = convert(place, tmp_path / name, tokenizer=POCKET / "tokenizer.model", progress=False).path
        assert len(open_checkpoint(made).tokenizer) == 4096


def test_a_space_before_every_text_stays(tmp_path: Path) -> None:
    """As a GGUF may ask for; Gemma 2's own do not."""
    path = tmp_path / "spaced.gguf"
    file = tiny_model()
    for name in [str(tensor.name) for tensor in file.tensors if "norm" in str(tensor.name)]:
        file = file.with_tensor(name, data=np.ones(32, np.float32).tobytes())
    path.write_bytes(file.with_pair("tokenizer.ggml.add_space_prefix", "bool", True).write())
    ids = open_checkpoint(path).tokenizer.encode("word")
    assert ids != gemma2.Tokenizer.from_file(POCKET / "tokenizer.model").encode("word")
    for name in TARGETS.values():
        assert open_checkpoint(convert(path, tmp_path / name, progress=False).path).tokenizer.encode("word") == ids


@pytest.mark.long
def test_the_text_of_a_model_whose_tokenizer_puts_a_space_before_every_text_stays(tmp_path: Path) -> None:
    place = tmp_path / "spaced"
    shutil.copytree(POCKET, place)
    (place / "tokenizer.model").write_bytes(space_prefixed((POCKET / "tokenizer.model").read_bytes()))
    written = gemma2.load(place, progress=False).generate("In the beginning God", 16)
    assert written == gemma2.load(POCKET, progress=False).generate(" In the beginning God", 16)
    assert written.count(" ") > 5
    quantized = convert(place, tmp_path / "middle.gguf", progress=False).path
    for path in (quantized, convert(quantized, tmp_path / "back", progress=False).path):
        gemma = gemma2.load(path, progress=False)
        assert gemma.generate("In the beginning God", 16) == written
        assert "".join(gemma.stream("In the beginning God", 16)) == written


# The command.


def test_the_command_prints_what_it_wrote_and_notes_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pocket.gguf"
    assert main(["convert", "pocket", str(path), "--type", "q4_0"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}: {path.stat().st_size:,} bytes, 68 tensors (42 Q4_0, 25 F32, 1 Q8_0)\n"
    assert err == "note: the embedding, which is also the head, is Q8_0: coarser, it costs most\n"
    assert gguf.GGUFReader(path).fields["general.name"].contents() == "pocket"
    assert main(["convert", str(path), str(tmp_path / "out"), "--type", "f32"]) == 0
    out, err = capsys.readouterr()
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert out == f"{tmp_path / 'out'}: {size:,} bytes, 68 tensors (68 F32)\n"
    assert all(line.startswith("note: ") for line in err.splitlines()) and "query scale" in err


def test_pocket_is_the_model_inside_unless_something_here_is_called_so(
    source: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gemma2.load("pocket", device="cpu").config == read_config(POCKET / "config.json")
    inside = gemma2.load("pocket:model.safetensors", device="cpu")
    assert inside.config.hidden_size == 256
    for absent in ("pocket:absent.gguf", "pocket:../pocket/model.safetensors", "pocket:"):
        with pytest.raises(gemma2.BadModelFile, match="no such file or folder"):
            gemma2.load(absent)
    source().rename(tmp_path / "pocket")
    assert gemma2.load("pocket", device="cpu").config.hidden_size == SMALL["hidden_size"]


@pytest.mark.long
def test_no_progress_bar_in_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemma2", "convert", "pocket", str(tmp_path / "out.gguf")]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


@pytest.mark.long
@pytest.mark.posix
def test_a_terminal_sees_a_bar(tmp_path: Path) -> None:
    import pty
    import termios

    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))  # a terminal of no width shows no bar
    command = [sys.executable, "-m", "gemma2", "convert", "pocket", str(tmp_path / "out.gguf")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=end) as child:
        os.close(end)
        seen = b""
        with contextlib.suppress(OSError):  # Linux: the terminal's other end is gone
            while part := os.read(terminal, 4096):
                seen += part
    os.close(terminal)
    assert child.returncode == 0 and b"writing:" in seen
