"""The tokenizer.json that is written beside a tokenizer.model: transformers needs nothing else to read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from safetensors.torch import save_file

import gemma2
from gemma2 import Tokenizer
from gemma2.checkpoints.tokenizer_json import read_tokenizer_json
from gemma2.checkpoints.tokenizer_json_write import tokenizer_json
from gemma2.convert import convert
from gemma2.load import POCKET
from tests.conftest import SHARED, raw_config, tensors_of, tiny
from tests.test_tokenizer import space_prefixed
from tests.tokenizer_files import chatml, pocket, texts, write

REAL = SHARED / "data" / "gemma2-tokenizer"
pytestmark = pytest.mark.filterwarnings("ignore:the text begins with <bos>")
# Reads texts, and prints their ids for each folder, in an environment without the packages that read tokenizer.model.
PEER = """
import json, sys
sys.modules["sentencepiece"] = sys.modules["google.protobuf"] = sys.modules["tiktoken"] = None
import transformers
some = json.load(sys.stdin)
for folder in sys.argv[1:]:
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [peer.encode(text, add_special_tokens=False) for text in some]
    print(json.dumps([ids, peer.encode("Hi"), peer.eos_token]))
"""


def compare(folders: dict[Path, Tokenizer], count: int) -> None:
    """The folders' tokenizers in transformers, against ours."""
    pytest.importorskip("transformers")
    some = texts(6, count)
    command = [sys.executable, "-c", PEER, *map(str, folders)]
    done = subprocess.run(command, input=json.dumps(some), capture_output=True, encoding="utf-8", check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders)
    for line, tokenizer in zip(lines, folders.values(), strict=True):
        ids, greeting, eos = json.loads(line)
        ours = [tokenizer.encode(text, special=True, bos=False) for text in some]
        assert [text for text, a, b in zip(some, ids, ours, strict=True) if a != b] == []
        assert greeting == tokenizer.encode("Hi") and eos == "<eos>"


def test_auto_tokenizer_reads_a_converted_folder_without_other_packages(tmp_path: Path) -> None:
    place = tmp_path / "chatml"
    write(place, chatml(pocket()))
    write(place, raw_config("2b", vocab_size=4100), "config.json")
    save_file(tensors_of(tiny("2b", vocab_size=4100)), place / "model.safetensors")
    written = {
        convert(source, tmp_path / name, progress=False).path: gemma2.load(source).tokenizer
        for name, source in {"plain": POCKET, "added": place}.items()
    }
    compare(written, 400)


@pytest.mark.long
@pytest.mark.needs("shared", "data/gemma2-tokenizer")
def test_the_library_gives_the_same_ids_with_gemma_2s_own_vocabulary(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(REAL / "tokenizer.model")
    content = tokenizer_json(tokenizer)
    assert content is not None
    (tmp_path / "tokenizer.json").write_bytes(content)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("Hi").ids == tokenizer.encode("Hi")
    for text in texts(6, 300):
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, special=True, bos=False)
    again = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert again.to_proto() == tokenizer.to_proto() and again.added is None


def test_a_tokenizer_with_a_space_before_every_text_has_none() -> None:
    proto = space_prefixed((POCKET / "tokenizer.model").read_bytes())
    assert tokenizer_json(Tokenizer(proto)) is None
