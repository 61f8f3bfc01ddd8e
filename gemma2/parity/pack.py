"""Packs: what a model computes at every site, in a small JSON file without weights that any language reads.

A pack holds of each site what `summary.py` keeps of a value, taken of the model in float64; how far the same model in
float32 and in bfloat16 is from that; and so how far a port may be. A port writes the same of its own values, and
`judge_pack.py` names the first site at which it is farther. docs/packs.md is the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.dtypes import RUNNABLE, dtype_name
from gemma2.checkpoints.hf_config import config_dict, read_config, read_json
from gemma2.config import Gemma2Config
from gemma2.errors import BadModelFile, NonFiniteError
from gemma2.model import Gemma2
from gemma2.parity.compare import CHANCE, FLOOR, in_dtype
from gemma2.parity.summary import DIGITS, NUMBERS, Summary, has_channels, hashed, powers, summarise, unmasked
from gemma2.parity.trace import About
from gemma2.research import watching
from gemma2.research.sites import chosen, sites
from gemma2.strict_json import finite

FORMAT = "gemma2-pack 1"
WHOLE = 1e9  # bytes; no pack is larger
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of which a pack holds the errors
PASSES = 2 + len(DTYPES)  # of the model: in float64, in these, and as it is
# Times our own error: how far a port may be. Of 54 sound random models in bfloat16 the farthest site was at 1.42 and
# 1.6; docs/packs.md has the table of what these find.
VALUES_FACTOR, CHANNELS_FACTOR = 2.0, 2.5
EXACT = 10.0 ** (1 - DIGITS)  # relative: what the digits of a pack leave open


@dataclass(frozen=True)
class Site:
    """One site of a pack or of a port.

    Attributes:
        seen: the summary of its value.
        error: of a pack: dtype -> rms of our error in it, by the rms of the value.
        allowed: of a pack: dtype -> how far a port's projection may be from this one's, and its channels, if any.
    """

    seen: Summary
    error: dict[str, float]
    allowed: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Pack:
    """An opened pack, or what a port has written: `sites` in the order of computation.

    Attributes:
        dtype: of a port: in which it computes; of a pack: in which its `bits` were taken, under `profile`.
        config: None where a port does not state it.
    """

    path: str
    system: str
    dtype: str
    ids: list[int]
    sites: dict[str, Site]
    config: Gemma2Config | None
    text: str | None


def make_pack(
    model: Gemma2,
    ids: Sequence[int],
    about: About,
    patterns: Iterable[str] | str = "*",
    text: str | None = None,
    tell: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """The pack of a plain model on the CPU, ready for `json.dumps`. It runs the model four times, once in float64, and
    holds the float64 values of all sites meanwhile.

    Args:
        tell: called with each site's name in each of the four passes.
    Raises:
        ValueError: a pattern that names no site, or token ids outside the vocabulary.
        NonFiniteError: a value that is not finite, which no pack holds.
    """
    wanted = list(chosen(model.config, patterns))
    wrong = [number for number in ids if not 0 <= number < model.config.vocab_size]
    if wrong or not len(ids):
        vocabulary = f"the vocabulary [0, {model.config.vocab_size})"
        raise ValueError(f"token id {wrong[0]} is outside {vocabulary}" if wrong else "give at least one token id")
    tokens = torch.tensor([list(ids)])
    truth: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}

    def see(name: str, value: Tensor) -> None:
        plain, _ = unmasked(name, value[0])
        if not plain.isfinite().all():
            raise NonFiniteError(f"{name} is not finite in float64, so no pack is written")
        truth[name], found[name] = value[0].cpu(), summarise(name, value[0]).to_dict()
        _, exact = allowance(name, truth[name], truth[name], FLOOR[torch.float64])
        found[name] |= {"error": {}, "allowed": {"float64": exact}}
        tell(name)

    def judge(dtype: str) -> Callable[[str, Tensor], None]:
        def see(name: str, value: Tensor) -> None:
            error, allowed = allowance(name, truth[name], value[0], FLOOR[DTYPES[dtype]])
            found[name]["error"][dtype], found[name]["allowed"][dtype] = float(f"{error:.3g}"), allowed
            tell(name)

        return see

    def hash_bits(name: str, value: Tensor) -> None:
        found[name]["bits"] = hashed(value[0])
        tell(name)

    with torch.no_grad():
        with in_dtype(model, torch.float64), watching(model, see, wanted):
            model(tokens)
        for dtype in DTYPES:
            with in_dtype(model, DTYPES[dtype]), watching(model, judge(dtype), wanted):
                model(tokens)
        with watching(model, hash_bits, wanted):
            model(tokens)
    return {
        "format": FORMAT,
        "system": about.system,
        "dtype": about.dtype,
        "profile": "transformers",
        "text": text,
        "ids": list(ids),
        "config": config_dict(about.config),
        "versions": dict(about.versions),
        "sites": {name: found[name] for name in wanted},
    }


def allowance(name: str, truth: Tensor, own: Tensor, floor: float) -> tuple[float, list[float]]:
    """Our relative error at a site, and how far a port's projection of values may be, and that of channels if any."""
    plain, other = unmasked(name, truth)[0], unmasked(name, own)[0]
    length, error = plain.norm().item(), (other - plain).norm().item()
    if not math.isfinite(error):
        raise NonFiniteError(f"{name} is not finite in {dtype_name(own.dtype)}, so no pack is written")
    relative = error / length if length else 0.0
    # As in compare.py: where we happen to be exact the floor stands, and few values may be right by chance.
    by_chance = max(relative, floor, EXACT) * (1 + CHANCE / math.sqrt(plain.numel()))
    allowed = [VALUES_FACTOR * by_chance * length]
    if has_channels(name, plain):
        power, change = powers(plain), (powers(other) - powers(plain)).norm().item()
        # The errors of a channel's values cancel out in its sum of squares, but not wholly over so few tokens.
        left = 2 * by_chance / math.sqrt(plain.numel() // plain.shape[-1]) * power.norm().item()
        allowed.append(CHANNELS_FACTOR * max(change, left))
    return relative, [float(f"{x:.4g}") for x in allowed]


def dumped(pack: dict[str, Any]) -> str:
    """JSON with one line for each site."""
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pack.items() if key != "sites"]
    body = [f"  {json.dumps(name)}: {json.dumps(site, allow_nan=False)}" for name, site in pack["sites"].items()]
    return "{\n" + ",\n".join(head) + ',\n"sites": {\n' + ",\n".join(body) + "\n}\n}\n"


def read_pack(path: Path) -> Pack:
    """Raises BadModelFile for a file that is no pack, or damaged; says what and where."""
    stated = _read(path)
    for key in ("ids", "config", "sites", "dtype", "system"):
        if key not in stated:
            raise BadModelFile(f"{path}: a pack must state {key}")
    config = read_config(_object(stated["config"], f"{path}: config"), where=f"{path}: config")
    pack = _parsed(path, stated, config)
    for name, site in pack.sites.items():
        if not site.allowed:
            raise BadModelFile(
                f"{path}: {name} states nothing as allowed, so this is a port's file: the pack comes first, as in "
                f"gemma2 parity PACK --against port.json"
            )
    return pack


def read_port(path: Path, pack: Pack) -> Pack:
    """What a port has written of the token ids in a pack. Raises BadModelFile, as `read_pack`."""
    return parse_port(path, _read(path), pack)


def parse_port(path: Path, stated: dict[str, Any], pack: Pack) -> Pack:
    """The same of a file's content. `path` is what messages call it."""
    for key in ("sites", "dtype"):
        if key not in stated:
            raise BadModelFile(f"{path}: a port must state {key}")
    assert pack.config is not None
    ids = stated.setdefault("ids", pack.ids)
    if ids != pack.ids:
        raise BadModelFile(f"{path}: its ids are not those of {pack.path}, of which there are {len(pack.ids)}")
    port = _parsed(path, stated, pack.config)
    for name in port.sites.keys() & pack.sites.keys():
        ours, theirs = pack.sites[name].seen, port.sites[name].seen
        left = ["channels"] if ours.channels and not theirs.channels else []
        left += ["masked"] if ours.masked is not None and theirs.masked is None else []
        if left:
            raise BadModelFile(f"{path}: {name} does not state {' and '.join(left)}, by which the pack judges it too")
    return port


def _read(path: Path) -> dict[str, Any]:
    stated = _object(read_json(path, int(WHOLE)), str(path))
    if stated.get("format") != FORMAT:
        raise BadModelFile(f"{path}: no pack: it does not say format {FORMAT!r}")
    return stated


def _parsed(path: Path, stated: dict[str, Any], config: Gemma2Config) -> Pack:
    ids, dtype, text = stated["ids"], stated["dtype"], stated.get("text")
    if not isinstance(dtype, str) or dtype not in RUNNABLE:
        raise BadModelFile(f"{path}: dtype {str(dtype)[:50]!r} is not one of {', '.join(RUNNABLE)}")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise BadModelFile(f"{path}: ids must be a list of token ids in [0, {config.vocab_size})")
    found, known = _object(stated["sites"], f"{path}: sites"), sites(config)
    if not found:
        raise BadModelFile(f"{path}: it has no site")
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise BadModelFile(
            f"{path}: {unknown[0][:100]!r} is not a site of a Gemma 2 of this config (gemma2 trace --list shows all)"
        )
    parsed = {
        name: _site(f"{path}: {name}", _object(found[name], f"{path}: {name}"), site.sizes(config, len(ids))[1:])
        for name, site in known.items()  # in the order of computation
        if name in found
    }
    system = str(stated.get("system", "a port"))
    return Pack(str(path), system, dtype, ids, parsed, config, text if isinstance(text, str) else None)


def _site(where: str, stated: dict[str, Any], shape: tuple[int, ...]) -> Site:
    missing = [key for key in ("shape", "rms", "max", "projection") if key not in stated]
    if missing:
        raise BadModelFile(f"{where} does not state {', '.join(missing)}")
    if stated["shape"] != list(shape):
        raise BadModelFile(f"{where} is {stated['shape']}, and its ids and config make it {list(shape)}")
    masked, at = stated.get("masked"), stated.get("at", [])
    if not (masked is None or type(masked) is int):
        raise BadModelFile(f"{where}: masked must be a whole number")
    if not isinstance(at, list) or not all(type(i) is int for i in at):
        raise BadModelFile(f"{where}: at must be a list of whole numbers")
    rms, largest = (_numbers(f"{where}: {key}", [stated[key]], 1)[0] for key in ("rms", "max"))
    channels = _numbers(f"{where}: channels", stated["channels"], NUMBERS) if "channels" in stated else ()
    seen = Summary(
        shape,
        rms,
        largest,
        tuple(at),
        _numbers(f"{where}: projection", stated["projection"], NUMBERS),
        channels,
        masked,
        str(stated.get("bits", "")),
    )
    error, allowed = (_object(stated.get(key, {}), f"{where}: {key}") for key in ("error", "allowed"))
    count = 2 if channels else 1
    return Site(
        seen,
        {dtype: _numbers(f"{where}: error", [x], 1)[0] for dtype, x in error.items()},
        {dtype: _numbers(f"{where}: allowed", x, count) for dtype, x in allowed.items()},
    )


def _numbers(where: str, given: object, count: int) -> tuple[float, ...]:
    """Numbers; null, which JSON has for what is not finite, is NaN."""
    if not isinstance(given, list) or len(given) != count:
        raise BadModelFile(f"{where} must be a list of {count} number{'s' * (count > 1)}")
    if not all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in given):
        raise BadModelFile(f"{where} holds something that is not a number")
    try:
        return tuple(math.nan if x is None else float(x) for x in given)
    except OverflowError:  # a whole number of hundreds of digits
        raise BadModelFile(f"{where} holds a number beyond float64") from None


def _object(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadModelFile(f"{where}: must be a JSON object")
    return given


def port_of(system: str, dtype: str, ids: Sequence[int], values: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What a port would write of values without the batch axis, ready for `json.dumps`: null for what is not finite."""
    found = {name: summarise(name, value, bits=True).to_dict() for name, value in values}
    return {"format": FORMAT, "system": system, "dtype": dtype, "ids": list(ids), "sites": finite(found)}
