"""Other people's Gemma 2, each built by its own code with the weights of a folder and run on given ids.

    python scripts/peers.py RECIPE FOLDER OUT DTYPE [OPTION=VALUE ...]

`who_computes_what.py` runs this with the peer's own Python, so nothing but the peer, torch and safetensors is imported.
FOLDER holds config.json, model.safetensors in Hugging Face's names, model.gguf if it is asked for, and ids.json: the
runs, as name -> {ids, chunks}. OUT gets a trace of each run (RUN.safetensors), or what the peer said instead (RUN.txt).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import peer_recipes
import torch
from peer_deepmind import deepmind
from peer_given import Given, Peer
from safetensors.torch import save_file

RECIPES: dict[str, Callable[..., Peer]] = {
    "transformers": peer_recipes.transformers_,
    "nnsight": peer_recipes.nnsight,
    "litgpt": peer_recipes.litgpt,
    "torchtune": peer_recipes.torchtune,
    "transformer_lens": peer_recipes.transformer_lens,
    "transformer_bridge": peer_recipes.transformer_bridge,
    "llama.cpp": peer_recipes.llama_cpp,
    "deepmind": deepmind,
}


def main() -> None:
    recipe, folder, out, dtype, *options = sys.argv[1:]
    torch.set_num_threads(1)
    place, config = Path(out), json.loads((Path(folder) / "config.json").read_text())
    runs = json.loads((Path(folder) / "ids.json").read_text())
    longest = max(len(run["ids"]) for run in runs.values())
    given = Given(Path(folder), config, getattr(torch, dtype), longest)
    peer = RECIPES[recipe](given, **dict(option.split("=", 1) for option in options))
    for name, asked in runs.items():
        tokens = torch.tensor([asked["ids"]])
        with torch.no_grad():
            try:
                if not asked["chunks"]:
                    found = peer.run(tokens)
                elif peer.cached:
                    found = {"logits": peer.cached(tokens, asked["chunks"])}
                else:
                    continue
            except Exception as error:  # whatever a peer may raise is what it says
                (place / f"{name}.txt").write_text(f"{type(error).__name__}: {error}")
                continue
        about = {"format": "gemma2-trace 1", "system": peer.system, "dtype": dtype, "config": json.dumps(config)}
        about["versions"] = json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]})
        tensors = {site: value[0].contiguous().clone() for site, value in found.items()}
        save_file({"ids": tokens[0], **tensors}, place / f"{name}.safetensors", metadata=about)


if __name__ == "__main__":
    main()
