"""Other people's Gemma 2, each built by its own code with the weights of a folder and run on given ids.

    python -m studies.who_computes_what.run_one RECIPE FOLDER OUT DTYPE [OPTION=VALUE ...]

The study runs this, in the folder of this repository, with the Python of an environment that has the implementation.
Nothing else is imported but torch and safetensors. FOLDER holds config.json, model.safetensors in Hugging Face's names,
model.gguf if it is asked for, and ids.json: the runs, as name -> {ids, chunks}. OUT gets a trace of each run
(RUN.safetensors), or the error that was raised instead (RUN.txt).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from studies.who_computes_what import recipes
from studies.who_computes_what.deepmind import deepmind
from studies.who_computes_what.given import Built, Given

RECIPES: dict[str, Callable[..., Built]] = {
    "transformers": recipes.transformers_,
    "nnsight": recipes.nnsight,
    "litgpt": recipes.litgpt,
    "torchtune": recipes.torchtune,
    "transformer_lens": recipes.transformer_lens,
    "transformer_bridge": recipes.transformer_bridge,
    "llama.cpp": recipes.llama_cpp,
    "deepmind": deepmind,
}


def main() -> None:
    recipe, folder, out, dtype, *options = sys.argv[1:]
    torch.set_num_threads(1)
    place, config = Path(out), json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    runs = json.loads((Path(folder) / "ids.json").read_text(encoding="utf-8"))
    longest = max(len(run["ids"]) for run in runs.values())
    given = Given(Path(folder), config, getattr(torch, dtype), longest)
    built = RECIPES[recipe](given, **dict(option.split("=", 1) for option in options))
    for name, asked in runs.items():
        tokens = torch.tensor([asked["ids"]])
        with torch.no_grad():
            try:
                if not asked["chunks"]:
                    found = built.run(tokens)
                elif built.cached:
                    found = {"logits": built.cached(tokens, asked["chunks"])}
                else:
                    continue
            except Exception as error:  # whatever it may raise is recorded
                (place / f"{name}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                continue
        about = {"format": "gemma2-trace 1", "system": built.system, "dtype": dtype, "config": json.dumps(config)}
        about["versions"] = json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]})
        tensors = {site: value[0].contiguous().clone() for site, value in found.items()}
        save_file({"ids": tokens[0], **tensors}, place / f"{name}.safetensors", metadata=about)


if __name__ == "__main__":
    main()
