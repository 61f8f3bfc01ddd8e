"""The page about quantization: the pocket model in every type that `gemma2 convert` writes, and in K and IQ types of
llama.cpp's quantizer, beside the model itself.

    python scripts/quantization_page.py --measure held-out.txt docs/quantization    # pocket.json and atlas.png, minutes
    python scripts/quantization_page.py --llama-cpp held-out.txt docs/quantization  # adds to it what needs llama.cpp
    python scripts/quantization_page.py docs/quantization/pocket.json > docs/quantization.md

Without these options nothing is computed: the page is printed from the recorded run. Its text is in
docs/quantization/template.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from gemma2.cli import main as gemma2
from gemma2.convert import TYPES
from gemma2.evaluate.compare_report import DRAWN, short

WINDOW, TOKENS, ATLAS = 1024, 10240, 512
QUANTIZED = [name for name in TYPES if name not in ("f32", "f16", "bf16")]
SHOWN = "q4_0"  # whose atlas is shown in full
RANKED = 8
# Written by llama.cpp's quantizer, without an importance matrix; those of two bits and less want one.
LLAMA_CPP = ["q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"]
TEMPLATE = Path(__file__).parents[1] / "docs" / "quantization" / "template.md"


def measure(text: Path, folder: Path) -> None:
    """Convert the pocket model into a temporary folder, compare, and write the record and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        files = {name: str(Path(made) / f"{name}.gguf") for name in TYPES}
        for name, file in files.items():
            run(["convert", "pocket", file, "--type", name])
        common = ["--text", str(text), "--window", str(WINDOW), "--stride", str(WINDOW), "--device", "cpu", "--json"]
        table = ["compare", "pocket", *files.values(), "--limit", str(TOKENS), "--weights", "packed", "--fast"]
        atlas = ["compare", "pocket", *(files[name] for name in QUANTIZED), "--limit", str(ATLAS), "--no-speed"]
        atlas += ["--passages", "0", "--atlas", "--atlas-limit", str(ATLAS)]
        record = {"table": json.loads(run([*table, *common])), "atlas": json.loads(run([*atlas, *common]))}
        shown = ["compare", "pocket", files[SHOWN], "--limit", str(ATLAS), "--no-speed", "--atlas", "--atlas-limit"]
        run([*shown, str(ATLAS), *common, "--png", str(folder / "atlas.png"), "--force"])
    (folder / "pocket.json").write_text(json.dumps(rounded(record)) + "\n", encoding="utf-8")


def beside_llama_cpp(text: Path, folder: Path) -> None:
    """Add to the record what llama.cpp's own logits give, on one window of the text, and the table of the types that it
    writes itself. Needs llama-cpp-python."""
    import llama_cpp
    from compare_llama_cpp import llama_cpp_logits

    from gemma2 import load
    from gemma2.evaluate.compare import compare

    a = load("pocket", dtype="float32", device="cpu")
    ids = a.tokenizer.encode(text.read_text(encoding="utf-8"))[: ATLAS + 1]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        logprobs: dict[str, torch.Tensor] = {}
        for name in ("f32", *QUANTIZED):
            file = str(Path(made) / f"{name}.gguf")
            run(["convert", "pocket", file, "--type", name])
            logprobs[name] = llama_cpp_logits(Path(file), ids)[:-1].double().log_softmax(dim=-1)
            p, q = logprobs["f32"], logprobs[name]
            theirs = (p.exp() * (p - q)).sum(dim=-1).mean()
            ours = compare(a, load(file, dtype="float32", device="cpu"), ids[1:]).kl.mean()
            found[name] = {"theirs": float(theirs), "ours": float(ours), "tokens": len(ids) - 1}
        files = [str(Path(made) / f"{name}.gguf") for name in LLAMA_CPP]
        for name, file in zip(LLAMA_CPP, files, strict=True):
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
            if llama_cpp.llama_model_quantize(str(Path(made) / "f32.gguf").encode(), file.encode(), options):
                raise SystemExit(f"llama.cpp does not quantize the pocket model to {name}")
        table = ["compare", "pocket", *files, "--limit", str(TOKENS), "--window", str(WINDOW), "--stride", str(WINDOW)]
        written = json.loads(run([*table, "--text", str(text), "--device", "cpu", "--no-speed", "--json"]))
    path = folder / "pocket.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    more = {"llama.cpp": rounded(found), "written by llama.cpp": rounded(written)}
    path.write_text(json.dumps(record | more) + "\n", encoding="utf-8")


def run(arguments: list[str]) -> str:
    """What a command prints. Ends the program where the command fails."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = gemma2(arguments)
    if code:
        raise SystemExit(code)
    return printed.getvalue()


def rounded(value: Any) -> Any:
    """Six digits of each figure, and file names without their folder."""
    if isinstance(value, dict):
        return {key: Path(item).name if key == "source" else rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def sizes(record: dict[str, Any]) -> str:
    head = ["file", "bytes", "bits a weight", "perplexity", "times A's [95 %]"]
    timed = record["a"]["speed"] is not None
    head += ["prompt, tokens/s", "decode, tokens/s"] if timed else []
    a, others = record["a"], record["b"]
    lines = []
    for one in (a, *others):
        summary = one["summary"]
        perplexity = others[0]["summary"]["before"] if summary is None else summary["after"]
        ends = [] if summary is None else [math.exp(summary["ratio"][name]) for name in ("value", "low", "high")]
        ratio = f"{ends[0]:.4f} [{ends[1]:.4f}, {ends[2]:.4f}]" if ends else "1"
        speeds = [f"{one['speed'][name]:,.0f}" for name in ("prompt", "decode")] if timed else []
        stored = one["stored"]
        lines.append(
            [one["name"], f"{stored['bytes']:,}", f"{stored['bits']:.2f}", f"{perplexity:.3f}", ratio, *speeds]
        )
    return markdown(head, lines)


def distances(record: dict[str, Any]) -> str:
    head = ["file", "KL in nats [95 %]", "median", "99 %", "largest", "same top token", "RMS change of p"]
    lines = []
    for one in record["b"]:
        found = one["summary"]
        kl = found["kl"]
        between = short(kl["value"])
        if abs(kl["value"]) >= 1e-8:
            between += f" [{short(kl['low'])}, {short(kl['high'])}]"
        numbers = [short(found[name]) for name in ("median", "high", "most")]
        lines.append([one["name"], between, *numbers, f"{found['same']['value']:.2%}", f"{found['change']:.2%}"])
    return markdown(head, lines)


def passage(record: dict[str, Any]) -> str:
    """The worst passage of the shown type, with the KL of its worst tokens."""
    from gemma2.load import POCKET
    from gemma2.pictures.page import readable
    from gemma2.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(POCKET / "tokenizer.model")
    one = next(one for one in record["b"] if one["name"] == SHOWN)["passages"][0]
    worst, ((a, p), (b, q)) = one["worst"], one["top"]
    return (
        f"Its worst passage of {len(one['ids'])} tokens has {short(one['mean'])} nats a token:\n\n"
        f"```text\n{tokenizer.decode(one['ids']).strip()}\n```\n\n"
        f"The worst token of it is `{readable(tokenizer, one['ids'][worst])}` with {short(one['kl'][worst])} nats. "
        f"There the likeliest token of the pocket model is `{readable(tokenizer, a)}` ({p:.1%}), and that of {SHOWN} "
        f"is `{readable(tokenizer, b)}` ({q:.1%})."
    )


def layers(atlas: dict[str, Any]) -> str:
    """KL of each matrix alone and its relative error, layers by kinds."""
    cells = {(m["layer"], m["kind"]): m for m in atlas["matrices"]}
    kinds = [group["name"] for group in atlas["kinds"] if group["name"] != "embed_tokens"]
    lines = []
    for number, group in enumerate(atlas["layers"]):
        row = [f"{short(cells[number, kind]['kl'])} ({cells[number, kind]['error']:.1%})" for kind in kinds]
        lines.append([str(number), *row, short(group["kl"])])
    sums = {group["name"]: group["kl"] for group in atlas["kinds"]}
    lines.append(["all", *(short(sums[kind]) for kind in kinds), short(atlas["kl"])])
    return markdown(["layer", *kinds, "together"], lines)


def ranked(atlas: dict[str, Any]) -> str:
    head = ["matrix", "type", "weights", "error", "KL alone", "saved by one more bit", "saved a megabyte"]
    lines = [
        [
            f"`{m['name'].removeprefix('model.').removesuffix('.weight')}`",
            m["stored"]["type"].lower(),
            f"{m['stored']['weights']:,}",
            f"{m['error']:.2%}",
            *(short(m[name]) for name in ("kl", "gain", "worth")),
        ]
        for m in sorted(atlas["matrices"], key=lambda m: -m["worth"])[:RANKED]
    ]
    return markdown(head, lines)


def llama_cpp(record: dict[str, Any]) -> str:
    lines = [[name, short(one["ours"]), short(one["theirs"])] for name, one in record.items()]
    return markdown(["file", "KL here", "KL of llama.cpp's logits"], lines)


def kinds(record: dict[str, Any]) -> str:
    """For every type the KL of each kind of matrices, and the matrix that is worth most."""
    names = [group["name"] for group in record["b"][0]["atlas"]["kinds"]]
    lines = []
    for one in record["b"]:
        atlas = one["atlas"]
        first = max(atlas["matrices"], key=lambda m: m["worth"])
        name = first["name"].removeprefix("model.").removesuffix(".weight")
        lines.append([one["name"], *(short(group["kl"]) for group in atlas["kinds"]), short(atlas["kl"]), f"`{name}`"])
    return markdown(["file", *names, "all", "worth most"], lines)


def sites(atlas: dict[str, Any]) -> str:
    errors = {site["name"]: site["error"] for site in atlas["sites"]}
    count = len(atlas["layers"])
    lines = [[f"`{name}`", *(f"{errors[f'blocks.{i}.{name}']:.1%}" for i in range(count))] for name in DRAWN]
    return markdown(["site", *(f"layer {i}" for i in range(count))], lines)


def page(record: dict[str, Any]) -> str:
    table, atlas = record["table"], record["atlas"]
    shown = next(one for one in atlas["b"] if one["name"] == SHOWN)["atlas"]
    embedding = next(m for m in shown["matrices"] if m["layer"] is None)
    return TEMPLATE.read_text(encoding="utf-8").format(
        sizes=sizes(table),
        distances=distances(table),
        text=table["text"],
        about=table["about"],
        atlas_text=atlas["text"],
        passage=passage(table),
        layers=layers(shown),
        embedding=short(embedding["kl"]),
        embedding_share=f"{embedding['stored']['weights'] / table['a']['stored']['weights']:.0%}",
        whole=short(shown["kl"]),
        alone=short(sum(m["kl"] for m in shown["matrices"])),
        ranked=ranked(shown),
        kinds=kinds(atlas),
        llama_cpp=llama_cpp(record["llama.cpp"]),
        written_about=record["written by llama.cpp"]["about"],
        written_sizes=sizes(record["written by llama.cpp"]),
        written_distances=distances(record["written by llama.cpp"]),
        sites=sites(shown),
        shown=SHOWN,
        ranked_count=RANKED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="TEXT", type=Path, help="measure on this text first, in UTF-8")
    parser.add_argument("--llama-cpp", metavar="TEXT", type=Path, help="add llama.cpp's KL on this text to the record")
    parser.add_argument("record", type=Path, help="the record; with one of the options the folder that it is in")
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure, args.record)
    if args.llama_cpp is not None:
        beside_llama_cpp(args.llama_cpp, args.record)
    if args.measure is not None or args.llama_cpp is not None:
        return
    print(page(json.loads(args.record.read_text(encoding="utf-8"))), end="")


if __name__ == "__main__":
    main()
