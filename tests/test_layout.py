"""The rooms of the package: imports point one way, also the lazy ones; the core stays short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gemma2

PACKAGE = Path(gemma2.__file__).parent
# A file may import only from rows above its own (and, in a package, from its own folder).
ROWS = [
    [
        "errors",
        "atomic",
        "checks",
        "memory",
        "stats",
        "strict_json",
        "symbols",
        "template_tags",
        "tied",
        "tokens",
        "warmup",
    ],
    ["config", "ops", "template_reading"],
    ["cache", "tokenizer", "sampling"],
    ["model", "chat", "detokenizer", "feed", "scored_text", "templates"],
    ["twins", "generate", "head"],
    ["losses", "scoring"],
    ["gemma", "recompute"],
    ["checkpoints"],
    ["fast", "research"],
    ["talk", "hub", "numerics", "distributed", "pictures"],
    ["load"],
    ["parity", "evaluate"],
    ["convert", "inspect", "bench"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
OPTIONAL = {"transformers", "llama_cpp", "lm_eval", "matplotlib", "accelerate", "peft", "bitsandbytes"}
# Each is imported in the one file that needs it: in a function, or in a file that is itself imported in one.
NEEDS = {
    "checkpoints/apply_adapter.py": "peft",
    "fast/bnb.py": "bitsandbytes",
    "distributed/device_map.py": "accelerate",
    "parity/report.py": "matplotlib",
    "pictures/drawing.py": "matplotlib",
    "parity/references/transformers.py": "transformers",
    "research/pretrained.py": "transformers",
    "parity/references/llama_cpp.py": "llama_cpp",
    "bench/peers/llama_cpp.py": "llama_cpp",
    "evaluate/harness.py": "lm_eval",
    "evaluate/tasks.py": "lm_eval",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.ImportFrom) or not node.level, f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            below = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "gemma2" else [node.module]
            )
            found |= set(below)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    level = {name: number for number, row in enumerate(ROWS) for name in row}
    own = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "gemma2" and len(parts) > 1 and parts[1] in level and parts[1] != own:
            assert level[parts[1]] < level[own], f"{path} imports {name}"
        assert parts[0] != "gemma2" or (len(parts) > 1 and parts[1] in level), f"{path}: {name}"
        allowed = NEEDS.get(path.relative_to(PACKAGE).as_posix())
        assert parts[0] not in OPTIONAL - {allowed}, f"{path} needs {name}, which is optional"


def at_once(path: Path) -> set[str]:
    """What is imported with a file, not in one of its functions."""
    later = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    lines = {line for node in later for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno not in lines]
    return {getattr(node, "module", None) or node.names[0].name for node in found}


def test_files_that_import_an_optional_peer_at_once_are_imported_only_when_asked_for() -> None:
    needy = [
        name
        for name, external in NEEDS.items()
        if external in {module.split(".")[0] for module in at_once(PACKAGE / name)}
    ]
    assert needy == [
        "parity/references/transformers.py",
        "research/pretrained.py",
        "parity/references/llama_cpp.py",
        "bench/peers/llama_cpp.py",
        "evaluate/harness.py",
        "evaluate/tasks.py",
    ]
    modules = {f"gemma2.{name.removesuffix('.py').replace('/', '.')}" for name in needy}
    for path in files():
        assert not at_once(path) & modules, path


def test_every_file_has_a_place_and_none_is_called_utils() -> None:
    known = {name for row in ROWS for name in row}
    assert {room(path) for path in files()} <= known
    assert not list(PACKAGE.rglob("util*.py"))


def test_the_core_can_be_read_in_one_sitting() -> None:
    core = ("config", "ops", "cache", "model", "generate")
    lines = {name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in core}
    assert lines["model"] <= 280 and sum(lines.values()) <= 700, lines


def test_nothing_runs_at_import_that_needs_the_network_or_a_device() -> None:
    for path in files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not called or path.name == "__main__.py", path
