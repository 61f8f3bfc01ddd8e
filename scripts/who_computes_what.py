"""Which implementations compute Gemma 2 as published, which compute something else, and at which length it shows.

    python scripts/who_computes_what.py --environments FOLDER > docs/who-computes-what.md
    python scripts/who_computes_what.py --environments FOLDER --only litgpt

Each peer is installed in an environment of its own in FOLDER (made if it is not there: a torch each, some GB in all),
builds its own Gemma 2 with the weights of a small random model (`scripts/peers.py`), and writes traces, which are held
against this project's model. What a peer computes instead is not read from its code but shown: with that one change
planted in our model, the two must agree to rounding; if they do not, the page says that it is unexplained.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2 import Gemma2, Gemma2Config, ops
from gemma2.config import GLOBAL, LOCAL
from gemma2.convert import convert
from gemma2.load import POCKET
from gemma2.model import SoftCap, TiedHead
from gemma2.parity.compare import compare, first_to_part, predicted
from gemma2.parity.numerics import with_numerics
from gemma2.parity.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16")
VISIBLE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest logit
BASE = ("torch==2.13.0", "safetensors==0.8.0")
# Name -> how many ids, and the chunks in which they are fed to a cache (none: one pass without). The window is 16.
RUNS: dict[str, tuple[int, list[int]]] = {
    "12": (12, []),
    "64": (64, []),
    "12 cached": (12, [6] + [1] * 6),
    "64 cached": (64, [32] + [1] * 32),
    "64 from 8": (64, [8] + [1] * 56),
}
TINY: dict[str, Any] = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "hidden_size": 288,
    "intermediate_size": 2304,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 36,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# A GGUF states no query scale: it is the width of a head, and hidden size / heads (here 18) where there are 46 layers.
MODELS: dict[str, dict[str, Any]] = {
    "4 layers": TINY,
    "4 layers, query scale 16": TINY | {"query_pre_attn_scalar": 16},
    "46 layers": TINY
    | {"num_hidden_layers": 46, "hidden_size": 144, "intermediate_size": 576, "query_pre_attn_scalar": 18},
}

Change = Callable[[Gemma2], Gemma2]


@dataclass(frozen=True)
class Finding:
    """What a peer was seen to compute instead.

    Attributes:
        runs: in which it differs; seen in others, or in fewer, it is not the same finding.
        what: in a sentence.
        instead: our model with that change, or the name of a numerics profile, to hold the peer against; None if the
            runs alone are the evidence.
    """

    runs: frozenset[str]
    what: str
    instead: Change | str | None


@dataclass(frozen=True)
class Peer:
    """One implementation at one version, by its recipe in `peers.py` with these options."""

    name: str
    recipe: str
    requires: tuple[str, ...]
    options: tuple[str, ...] = ()
    model: str = "4 layers"
    dtypes: tuple[str, ...] = DTYPES
    finding: Finding | None = None
    numerics: str | None = None  # a profile that explains what is left in a narrow dtype

    @property
    def environment(self) -> str:
        return self.requires[0].replace("==", "-")


@dataclass(frozen=True)
class Outcome:
    """One run: what was found, by how much the largest logit is off, and where the two part, if they do."""

    run: str
    verdict: str  # "equal bits", "rounding", "differs", "fails" or "not run"
    first: str = ""
    ratio: float = 0.0
    apart: float = 0.0
    said: str = ""
    position: int = -1  # the first whose logits are visibly off

    def cell(self) -> str:
        if self.verdict == "differs":
            return f"**differs**, {self.apart:.2g}"
        return f"**{self.verdict}**" if self.verdict == "fails" else self.verdict


class CappedHiddenHead(TiedHead):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(ops.softcap(x, 50.0), embedding)


class NoCap(SoftCap):
    def forward(self, x: Tensor) -> Tensor:
        return x


def changed(**numbers: Any) -> Change:
    """The same parameters under a config in which these numbers are others."""

    def change(model: Gemma2) -> Gemma2:
        with torch.device("meta"):
            other = Gemma2(replace(model.config, **numbers))
        other.load_state_dict(dict(model.named_parameters()), strict=True, assign=True)
        return other.eval()

    return change


def swapped(model: Gemma2) -> Gemma2:
    other = {LOCAL: GLOBAL, GLOBAL: LOCAL}
    return changed(layer_types=tuple(other[kind] for kind in model.config.layer_types))(model)


def without_window(model: Gemma2) -> Gemma2:
    return changed(layer_types=(GLOBAL,) * model.config.num_hidden_layers)(model)


def without_score_cap(model: Gemma2) -> Gemma2:
    other = changed()(model)
    for layer in other.model.layers:
        cap: nn.Module = layer.get_submodule("self_attn.attend.softcap")
        cap.__class__ = NoCap
    return other


def as_torchtune(model: Gemma2) -> Gemma2:
    other = changed(attn_logit_softcapping=30.0)(model)
    other.lm_head.__class__, other.softcap.__class__ = CappedHiddenHead, NoCap
    for layer in other.model.layers:
        before = layer.get_submodule("pre_feedforward_layernorm")
        after = layer.get_submodule("post_feedforward_layernorm")
        before.weight, after.weight = after.weight, before.weight
    return other


LONG = frozenset({"64", "64 cached", "64 from 8"})
ALL = frozenset(RUNS)


def transformers(number: str, attention: str = "eager", finding: Finding | None = None) -> Peer:
    more: tuple[str, ...] = ("numpy<2",) if number.startswith("4.4") else ()
    if number == "5.23.0":
        more = ("gguf==0.19.0", "accelerate==1.15.0", "protobuf==7.36.2")
    name = f"transformers {number}, {attention}"
    return Peer(name, "transformers", (f"transformers=={number}", *more), (f"attention={attention}",), finding=finding)


ONE_PASS = frozenset({"12", "64"})
PAST = frozenset({"64 cached", "64 from 8"})
CACHED = PAST | {"12 cached"}
LLAMA_CPP = ("llama-cpp-python==0.3.36", "-e .")
# What it asks for by way of kauldron (xmanager, and with it all of Google's cloud) pip does not resolve.
GEMMA = """
    gemma==3.3.0 --no-deps kauldron==1.4.2 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 clu==0.0.12 tensorflow==2.21.0
    keras==3.15.1 absl-py==2.5.1 astunparse==1.6.3 certifi charset-normalizer==3.5.2 chex==0.1.92 einops==0.8.2
    etils==1.15.0 filelock==4.2.12 flatbuffers==25.12.19 fsspec gast==0.7.0 google-pasta==0.2.0 grpcio==1.85.3
    h5py==3.14.0 humanize==4.17.0 idna==3.20 immutabledict==4.3.1 jaxtyping==0.3.11 jinja2==3.1.6 lark==1.3.1
    libclang==18.1.1 markdown-it-py==4.3.0 markupsafe==3.0.4 mdurl==0.1.2 ml_collections==1.1.0 ml_dtypes==0.6.0
    mpmath==1.3.0 msgpack==1.2.4 namex==0.1.0 networkx==3.6.1 numpy==2.4.6 opt_einsum==3.4.0 optax==0.2.8
    optree==0.20.0 orbax-checkpoint==0.12.8 packaging==26.3 protobuf==7.36.2 psutil==7.2.2 pygments==2.21.0
    pyyaml==6.0.4 requests==2.34.2 rich==15.0.0 scipy==1.17.1 sentencepiece==0.2.3 setuptools==84.2.1
    simplejson==4.3.0 six==1.17.0 sympy==1.14.0 tensorstore==0.1.86 termcolor==3.3.0 toolz==1.2.0 tqdm==4.70.1
    treescope==0.1.10 typeguard==4.6.1 typing_extensions==4.16.0 urllib3==2.8.0 wadler_lindig==0.1.8 wrapt==2.5.2
    zipp==4.1.2
"""
TABLE_GELU = Finding(
    ALL, "Gemma 2 in llama.cpp's arithmetic, which takes GELU from a table of 16-bit numbers.", "llama.cpp"
)
PEERS = [
    transformers("5.23.0"),
    transformers("5.23.0", "flex_attention"),
    transformers("4.57.1"),
    transformers(
        "4.48.0",
        finding=Finding(
            PAST,
            "As published in one pass. With its HybridCache, no decoding past the window.",
            None,
        ),
    ),
    transformers(
        "4.48.0",
        "sdpa",
        finding=Finding(
            ALL,
            "Scores are not capped. With its HybridCache, no decoding past the window.",
            without_score_cap,
        ),
    ),
    transformers(
        "4.42.4",
        finding=Finding(
            frozenset({"64 from 8"}),
            "As published in one pass. Where decoding fills the window of its HybridCache, logits are others from the "
            "window's last position on.",
            None,
        ),
    ),
    transformers(
        "4.42.3",
        finding=Finding(LONG, "Local and global layers are swapped, and no decoding past the window.", swapped),
    ),
    Peer(
        "transformers 5.23.0, a GGUF of 46 layers",
        "transformers",
        transformers("5.23.0").requires,
        ("gguf=model.gguf",),
        "46 layers",
        finding=Finding(
            ALL, "The query scale is 256^-0.5, where this model's is 18^-0.5.", changed(query_pre_attn_scalar=256)
        ),
    ),
    Peer("llama.cpp", "llama.cpp", LLAMA_CPP, (), "4 layers, query scale 16", ("float32",), TABLE_GELU),
    Peer("llama.cpp, 46 layers", "llama.cpp", LLAMA_CPP, (), "46 layers", ("float32",), TABLE_GELU),
    Peer(
        "TransformerLens, HookedTransformer",
        "transformer_lens",
        ("transformer-lens==2.16.1", "datasets==2.21.0", "pyarrow==17.0.0"),
        finding=Finding(LONG, "Local and global layers are swapped.", swapped),
    ),
    Peer(
        "litgpt",
        "litgpt",
        ("litgpt==0.5.13",),
        finding=Finding(
            CACHED,
            "As published in one pass. With its cache, other logits from position 0 on, which has only "
            "itself to see; and no prefill longer than the window.",
            None,
        ),
        numerics="litgpt",
    ),
    Peer(
        "torchtune",
        "torchtune",
        ("torchtune==0.6.1", "torchao==0.14.1"),
        finding=Finding(
            ALL,
            "Scores are capped at 30, a cap of 50 is on what the head reads instead of on the logits, and the norms "
            "before and after the MLP have each other's weights.",
            as_torchtune,
        ),
    ),
    Peer(
        "nnsight",
        "nnsight",
        ("nnsight==0.8.1", "transformers==5.24.0", "sentencepiece==0.2.3", "protobuf==7.36.2", "tiktoken"),
    ),
    Peer(
        "google-deepmind/gemma",
        "deepmind",
        tuple(GEMMA.split()),
        finding=Finding(
            ONE_PASS,
            "Gemma 2 in XLA's arithmetic: 1 + w is rounded to the weights' dtype, which shows in bfloat16, and tanh is "
            "up to 4.3 ulp off, which shows in float32 where logits are capped.",
            "jax",
        ),
        numerics="jax",
    ),
]


def random_model(raw: Mapping[str, Any], seed: int = 0) -> Gemma2:
    """Weights large enough that both caps saturate and norms matter."""
    model = Gemma2(Gemma2Config.from_dict(dict(raw))).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        gain = 4 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3
        std = 0.3 if "norm" in name else 1.0 if "embed" in name else gain * parameter.shape[-1] ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.requires_grad_(False)


def write_model(folder: Path, raw: Mapping[str, Any], gguf: bool) -> Gemma2:
    """What `peers.py` reads."""
    folder.mkdir()
    model = random_model(raw)
    (folder / "config.json").write_text(json.dumps(dict(raw)))
    (folder / "tokenizer.model").write_bytes((POCKET / "tokenizer.model").read_bytes())
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(raw["vocab_size"], (64,), generator=torch.Generator().manual_seed(1)).tolist()
    runs = {name: {"ids": ids[:length], "chunks": chunks} for name, (length, chunks) in RUNS.items()}
    (folder / "ids.json").write_text(json.dumps(runs))
    if gguf:
        convert(folder, folder / "model.gguf", type="F32", progress=False)
    return model


def environment(folder: Path, peer: Peer) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Raises:
        RuntimeError: it cannot be installed; says why in a line.
    """
    place = folder / peer.environment
    python, done = place / "bin" / "python", place / "installed"
    if not done.exists():
        venv.create(place, with_pip=True, clear=True)
        wanted = [word for line in (*BASE, *peer.requires) for word in line.split(" ")]
        _said(subprocess.run([python, "-m", "pip", "install", "-q", *wanted], cwd=ROOT, capture_output=True, text=True))
        done.write_text("\n".join((*BASE, *peer.requires)))
    return python


def traces(python: Path, peer: Peer, model: Path, out: Path, dtype: str) -> None:
    """Run a peer; raises RuntimeError with what it said last if it does not build its model."""
    out.mkdir(parents=True)
    command: list[str | Path] = [python, ROOT / "scripts" / "peers.py", peer.recipe, model, out, dtype, *peer.options]
    _said(subprocess.run(command, capture_output=True, text=True, timeout=600))


def _said(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip()[:300] if lines else f"exit code {done.returncode}")


def held(out: Path, model: Gemma2, profile: str | None = None) -> Iterator[Outcome]:
    """Each run's trace against a model of ours, in the trace's dtype and, if a profile is named, its arithmetic."""
    theirs = with_numerics(model, profile) if profile else None
    for run in RUNS:
        path, words = out / f"{run}.safetensors", out / f"{run}.txt"
        if path.exists():
            trace = Trace(path)
            yield judged(run, model, trace.ids, {name: trace[name] for name in trace.names}, theirs)
        else:
            said = " ".join(words.read_text().split())[:120] if words.exists() else ""
            yield Outcome(run, "fails" if said else "not run", said=said)


def judged(
    run: str, model: Gemma2, ids: list[int], values: Mapping[str, Tensor], theirs: Gemma2 | None = None
) -> Outcome:
    truth = predicted(model, ids)
    rows, logits = compare(model, ids, values, theirs, truth), truth["logits"]
    apart = (values["logits"].double() - logits).abs().amax(-1)
    first = first_to_part(rows)
    if first is None:
        verdict = "equal bits" if all(row.bitwise for row in rows) else "rounding"
        return Outcome(run, verdict, apart=apart.max().item())
    off = (apart > VISIBLE[model.model.embed_tokens.weight.dtype] * logits.abs().max()).nonzero()
    position = int(off[0]) if len(off) else -1
    return Outcome(run, "differs", first.site, first.ratio, apart.max().item(), first.why, position)


def differing(outcomes: Iterable[Outcome]) -> frozenset[str]:
    return frozenset(outcome.run for outcome in outcomes if outcome.verdict in ("differs", "fails"))


def explained(peer: Peer, outcomes: list[Outcome], out: Path, model: Gemma2) -> str:
    """What the peer computes, as far as these runs show it."""
    runs, finding = differing(outcomes), peer.finding
    if not runs:
        return "Gemma 2 as published."
    if finding is None or finding.runs != runs:
        return "Something else; not explained."
    if finding.instead is None:
        return finding.what
    profile = finding.instead if isinstance(finding.instead, str) else None
    planted = model if isinstance(finding.instead, str) else finding.instead(model)
    again = [one for one in held(out, planted, profile) if one.verdict not in ("fails", "not run")]
    left = differing(again)
    if len(left) == len(again):
        return "Something else; not explained."
    agree = f"all {len(again)}" if not left else f"{len(again) - len(left)} of {len(again)}"
    others = [f"{one.run} from position {one.position} on" for one in again if one.run in left]
    rest = f"; not explained: {', '.join(others)}" if others else ""
    return f"{finding.what} With this planted in our model, {agree} traces agree to rounding{rest}."


@dataclass(frozen=True)
class Found:
    """Of one peer: outcomes by dtype, and what they come to."""

    peer: Peer
    system: str
    outcomes: dict[str, list[Outcome]]
    says: str


def look_at(peer: Peer, environments: Path, place: Path) -> Found:
    """Raises RuntimeError, in a line, if the peer cannot be installed or does not build its model."""
    python = environment(environments, peer)
    folder = place / peer.model
    if not folder.exists():
        write_model(folder, MODELS[peer.model], gguf=peer.model == "46 layers")
    model = random_model(MODELS[peer.model])
    outcomes, says, system = {}, "", peer.name
    for dtype in peer.dtypes:
        out = place / peer.name.replace("/", "-") / dtype
        traces(python, peer, folder, out, dtype)
        ours = changed()(model).to(getattr(torch, dtype))
        outcomes[dtype] = list(held(out, ours))
        says = says or explained(peer, outcomes[dtype], out, ours)
        if peer.numerics and dtype != peer.dtypes[0]:
            again = ", ".join(f"{it.run}: {it.verdict}" for it in held(out, ours, peer.numerics) if it.run in ONE_PASS)
            says += f" In {dtype}, held against our model in `{peer.numerics}`'s arithmetic: {again}."
        if dtype == peer.dtypes[0]:
            system = next((Trace(path).about.system for path in sorted(out.glob("*.safetensors"))), system)
    return Found(peer, system, outcomes, says)


HEAD = """# Who computes what

Other implementations of Gemma 2, each built by its own code with the weights of a small random model, and held against
this project's. Printed on {date} by `scripts/who_computes_what.py` from runs, with torch {torch} and Python
{python} on a CPU ({machine}); nothing here is taken from others' reports. Another version may compute otherwise.

    python scripts/who_computes_what.py --environments FOLDER                # this page; installs each peer in FOLDER
    python scripts/who_computes_what.py --environments FOLDER --only litgpt  # one of them

The model is shaped like Gemma 2 27B, scaled down: {layers} layers, width {width}, {heads} query and {groups} key/value
heads of {head}, query scale {scale}^-0.5, caps {cap_scores:g} and {cap_logits:g}, and a window of {window}, where
the published models have 4096: what depends on the window shows here beyond {window} ids, and there beyond 4096.
Weights are random and large, so that caps bite; logits part farther than in a trained model. Another model, where a
peer was given one, is named in its section.

The runs: one pass over 12 ids, shorter than the window, and over 64, longer; with the peer's own cache, 12 ids as a
prefill of 6 and then one at a time, 64 as 32 and then one at a time, and 64 from a prefill of 8. A run's word is the
verdict of [`gemma2.parity`](parity.md): "rounding" is what the dtype explains, "equal bits" are ours, and where a peer
**differs** the number is the largest distance of a logit (they are within +-{cap_logits:g}) to the exact one. With a
cache only logits are seen. A run that **fails** has the peer's own words below; one "not run" has no recipe here.

What a peer computes instead is stated where it was seen: with that change planted in our model, its traces agree."""


def page(found: list[Found], absent: list[tuple[Peer, str]]) -> str:
    texts = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.backends.cpu.get_cpu_capability(),
    }
    names = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
    names |= {"groups": "num_key_value_heads", "head": "head_dim", "scale": "query_pre_attn_scalar"}
    names |= {"cap_scores": "attn_logit_softcapping", "cap_logits": "final_logit_softcapping"}
    names |= {"window": "sliding_window"}
    lines = [HEAD.format(**texts, **{key: TINY[name] for key, name in names.items()})]
    for dtype in DTYPES:
        lines += ["", f"## In {dtype}", "", f"| | {' | '.join(RUNS)} |", "|---" * (len(RUNS) + 1) + "|"]
        for one in found:
            if dtype in one.outcomes:
                lines.append(f"| {one.peer.name} | {' | '.join(it.cell() for it in one.outcomes[dtype])} |")
    for one in found:
        lines += ["", f"## {one.peer.name}", "", one.says, "", *details(one)]
    if absent:
        lines += ["", "## Not run", "", *(f"- {peer.name}: {reason}" for peer, reason in absent)]
    return "\n".join(lines)


def details(one: Found) -> Iterator[str]:
    """Where it differs, and how to see it again."""
    peer = one.peer
    yield f"{one.system}; {peer.model}."
    yield ""
    for dtype, outcomes in one.outcomes.items():
        for it in outcomes:
            if it.verdict == "differs":
                size = it.said or f"{it.ratio:.3g} times what rounding explains"
                where = f", visible in logits from position {it.position}" if it.position >= 0 else ""
                yield f"- {dtype}, {it.run}: first at `{it.first}`, {size}{where}"
            elif it.verdict == "fails":
                yield f"- {dtype}, {it.run}: `{it.said}`"
    requires = " ".join(f"'{line}'" if "<" in line else line for line in (*BASE, *peer.requires))
    yield "\n```sh"
    yield f"pip install {requires}  # what the next line does"
    yield f"python scripts/who_computes_what.py --environments FOLDER --only '{peer.name}'\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="where the peers are or will be installed")
    parser.add_argument("--only", action="append", choices=[peer.name for peer in PEERS], metavar="PEER", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, absent = [], []
    with tempfile.TemporaryDirectory() as place:
        for peer in PEERS:
            if args.only and peer.name not in args.only:
                continue
            print(peer.name, file=sys.stderr, flush=True)
            try:
                found.append(look_at(peer, args.environments, Path(place)))
            except (RuntimeError, OSError, subprocess.SubprocessError) as reason:
                absent.append((peer, str(reason)))
    print(page(found, absent))


if __name__ == "__main__":
    main()
