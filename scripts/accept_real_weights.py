"""Measure a real Gemma 2 against what was published of it: parameter counts, token ids, logits and activations in
float32, continuations (also beyond the window), perplexities. It runs what the machine can hold, prints pass, near-tie
or FAIL with the margin, and says of the rest why it was not tried.

    python scripts/accept_real_weights.py google/gemma-2-2b
    python scripts/accept_real_weights.py gemma-2-2b-it-Q4_K_M.gguf --text wiki.test.raw

The figures, each with its source, are in configs/evaluation/real_weights.json; docs/acceptance.md lists them. Exit
code 0: something passed and nothing failed; 1: something failed, or nothing could be tried.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from gemma2.checkpoints.hf_config import configs
from gemma2.cli.prompts import read_file
from gemma2.cli.show import escaped
from gemma2.evaluate.acceptance import FAIL, NEAR, NOTED, PASS, UNTRIED, Result, accept, open_model, which_model
from gemma2.evaluate.figures import read_figures
from gemma2.load import parse_device

FIGURES = "evaluation/real_weights.json"


def main(argv: list[str] | None = None) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("model", metavar="MODEL", help="as for gemma2.load: a hub name, a folder or a file")
    parser.add_argument("--text", metavar="FILE", type=Path, help="wikitext-2's wiki.test.raw, for the perplexities")
    parser.add_argument(
        "--as", dest="which", metavar="NAME", help="which model it is, as 2b-it; default: by its numbers"
    )
    parser.add_argument("--only", metavar="WORD", help="only the figures in whose name this is")
    parser.add_argument("--figures", metavar="FILE", type=Path, help="other published figures; default: those shipped")
    parser.add_argument("--device", metavar="D", help="cuda, mps or cpu; default: the best present, in this order")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub name; default: main")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
        print(f"accept_real_weights: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    figures = read_figures(args.figures or configs() / FIGURES)
    parse_device(args.device)
    if args.text is not None and not args.text.is_file():
        raise ValueError(f"--text {args.text}: no such file")
    text = None if args.text is None else read_file(args.text, "--text")
    path, opened = open_model(args.model, args.revision)
    which = which_model(figures, opened, args.model, args.which)
    mine = [check for check in figures.checks if which in check.models]
    asked = [check for check in mine if args.only is None or args.only in check.name]
    if not asked:
        names = ", ".join(check.name for check in mine) or "none"
        raise ValueError(f"no figure of {which} has {args.only!r} in its name; there are {names}")
    others = [check for check in figures.checks if which not in check.models]
    results: list[Result] = []
    with tqdm(total=len(asked), desc="figures", disable=None, leave=False, delay=1) as bar:
        for result in accept(str(path), opened, asked, text=text, device=args.device, tell=bar.set_postfix_str):
            results.append(result)
            if not args.json:
                bar.clear()
                print(f"{result.outcome:9}  {escaped(result.name)}: {escaped(result.detail)}", flush=True)
            bar.update()
    count = Counter(result.outcome for result in results)
    code = 1 if count[FAIL] or not count[PASS] else 0
    if args.json:
        stated = {"model": args.model, "which": which, "results": [asdict(result) for result in results], "exit": code}
        print(json.dumps(stated, indent=2))
        return code
    models = sorted({name for check in others for name in check.models} - {which})
    show(args.model, which, results, models, len(others))
    return code


def show(model: str, which: str, results: list[Result], models: list[str], others: int) -> None:
    """The sources, and what came of all."""
    print("\nsources")
    for source in dict.fromkeys(result.source for result in results):
        print(f"  {escaped(source)}")
    count = Counter(result.outcome for result in results)
    said = ", ".join(f"{count[outcome]} {outcome}" for outcome in (PASS, NEAR, FAIL, NOTED, UNTRIED) if count[outcome])
    print(f"\n{model}, as {which}: {said}")
    if others:
        print(f"{others} published figures are of other models: {', '.join(models)}")
    failed = dict.fromkeys(result.name.partition(":")[0] for result in results if result.outcome == FAIL)
    if failed:
        print(f"failed: {'; '.join(map(escaped, failed))}")
    elif not count[PASS]:
        print("nothing could be tried, so nothing is accepted")


if __name__ == "__main__":
    sys.exit(main())
