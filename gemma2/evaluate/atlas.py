"""The quantization atlas: what each quantized matrix, layer and site of B costs against the float model A.

Of each matrix: the relative error of its values; the KL that it alone causes, put into A; and the KL that one more bit
a weight would save in the quantized model. One more bit halves the error of a value, so the matrix is put half way
between A's and B's for that. Matrices are put into A from outside, and A has its own parameters again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma2.cache import NoCache
from gemma2.evaluate.compare import check_comparable, compare_states
from gemma2.evaluate.costs import Stored
from gemma2.evaluate.site_errors import SiteError, site_errors
from gemma2.evaluate.states import Cut, Tick, cut_text, head_of
from gemma2.gemma import Gemma
from gemma2.model import MLP, Attention, Block, Gemma2, ScaledEmbedding, TiedHead
from gemma2.tied import EMBEDDING

LIMIT, WINDOW = 1024, 512  # tokens of the text, and of a pass
ROWS = 2**22  # values of a matrix that are in float64 at once
KINDS = {  # of the matrices of a layer, and where each is
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
EMBED = "embed_tokens"
PLAIN = {"model.embed_tokens": ScaledEmbedding, "lm_head": TiedHead}  # and Block, Attention, MLP, nn.Linear in layers


@dataclass(frozen=True)
class Matrix:
    """One quantized matrix.

    Attributes:
        name: of the parameter; layer is None for the embedding, and kind is `embed_tokens` or one of `KINDS`.
        stored: how it is stored in B.
        error: ||W - Q(W)|| / ||W||.
        kl: KL(A || A with this matrix alone from B) in nats, the mean over tokens.
        gain: by how much KL(A || A with all matrices from B) falls when the error of this one is halved, as one more
            bit a weight does.
    """

    name: str
    layer: int | None
    kind: str
    stored: Stored
    error: float
    kl: float
    gain: float

    @property
    def worth(self) -> float:
        """KL saved by a megabyte (10^6 bytes) of more bits, in nats."""
        return self.gain / (self.stored.weights / 8e6)


@dataclass(frozen=True)
class Group:
    """Matrices that are put into A together: those of a layer, or of a kind in all layers, and the KL they cause."""

    name: str
    weights: int
    kl: float


@dataclass(frozen=True)
class Atlas:
    """What `atlas` finds.

    Attributes:
        tokens: of the text that were predicted.
        kl: of A with all matrices from B, in nats.
        matrices: in the model's order, the embedding first.
        layers, kinds: of each the KL of its matrices together.
        sites: in the order of computation.
        others: parameters that are no matrices and that differ between A and B: none where B is A, quantized.
    """

    tokens: int
    kl: float
    matrices: list[Matrix]
    layers: list[Group]
    kinds: list[Group]
    sites: list[SiteError]
    others: list[str]

    @property
    def ranked(self) -> list[Matrix]:
        """The matrices that are worth more bits, the one that saves most KL a byte first."""
        return sorted(self.matrices, key=lambda matrix: -matrix.worth)


def passes(layers: int) -> int:
    """How many passes over the text `atlas` takes for a model of so many layers: for a progress bar."""
    return 2 * (1 + len(KINDS) * layers) + layers + len(KINDS) + 2 + 2


@torch.no_grad()
def atlas(
    a: Gemma,
    b: Gemma,
    text: str | Sequence[int],
    stored: Mapping[str, Stored],
    *,
    limit: int | None = LIMIT,
    window: int | None = None,
    tick: Tick = lambda passes: None,
) -> Atlas:
    """Find what each quantized matrix of B costs.

    Args:
        a: the float model, without twins. Its matrices are replaced one at a time, and are its own again afterwards.
        b: the same model, quantized: its values as floats, or in a form (`weights="packed"`).
        text: text, or token ids without a BOS.
        stored: how B's matrices are stored, by the names of the parameters; see `gemma2.evaluate.costs.stored`.
        limit: use so many of the first tokens.
        window: tokens of a pass, its BOS included; default: 512, or the model's context if that is less.
        tick: called with 1 after each pass; `passes` says how many there are.
    Raises:
        ValueError: models of other shapes or vocabularies, A with twins or in a form, B with twins that hide a site;
            raised before anything is computed. See also `cut_text`.
    """
    check_comparable(a.tokenizer, b.tokenizer, (a.config.vocab_size, b.config.vocab_size))
    check_plain(a.model)
    names = [name for name, _ in _matrices(a.model)]
    _check_same_shapes(a.model, b.model, names)
    unknown = next((name for name in names if name not in stored), None)
    if unknown:
        raise ValueError(f"`stored` does not say how {unknown} is stored: gemma2.evaluate.costs.stored gives it")
    context = min(one.config.max_position_embeddings for one in (a, b))
    window = min(WINDOW, context) if window is None else window
    cut = cut_text(text, a.tokenizer, (a.config, b.config), window=window, stride=window, limit=limit)
    found = site_errors(a.model, b.model, cut)  # first, since it refuses twins that hide a site
    tick(2)
    own = dict(a.model.named_parameters())
    other = {name: _like(own[name], _weight(b.model, name)) for name in names}
    run = _Passes(a.model, cut)
    tick(1)
    alone = dict[str, float]()
    for name, layer in _matrices(a.model):
        with swapped(a.model, {name: other[name]}):
            alone[name] = run.kl(run.plain, layer or 0)
        tick(1)
    together = dict[str, float]()
    for number in range(a.config.num_hidden_layers):
        with swapped(a.model, {name: other[name] for name, layer in _matrices(a.model) if layer == number}):
            together[f"layer {number}"] = run.kl(run.plain, number)
        tick(1)
    for kind in KINDS:
        with swapped(a.model, {name: other[name] for name in names if _kind(name) == kind}):
            together[kind] = run.kl(run.plain, 0)
        tick(1)
    together[EMBED] = alone[EMBEDDING]
    gains = dict[str, float]()
    with swapped(a.model, other):
        quantized = run.residuals()
        whole = run.kl(quantized, 0)
        tick(1)
        for name, layer in _matrices(a.model):
            with swapped(a.model, {name: own[name] + (other[name] - own[name]) / 2}):
                gains[name] = whole - run.kl(quantized, layer or 0)
            tick(1)
    matrices = [
        Matrix(name, layer, _kind(name), stored[name], _error(own[name], other[name]), alone[name], gains[name])
        for name, layer in _matrices(a.model)
    ]
    weights = {
        name: sum(m.stored.weights for m in matrices if name in (f"layer {m.layer}", m.kind)) for name in together
    }
    groups = [Group(name, weights[name], kl) for name, kl in together.items()]
    others = [
        name
        for name, value in b.model.named_parameters()
        if name not in names and not torch.equal(_like(own[name], value), own[name])
    ]
    layers = a.config.num_hidden_layers
    return Atlas(len(cut.ids), whole, matrices, groups[:layers], groups[layers:], found, others)


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other values in the place of parameters for the length of the block. Afterwards the parameters are the same
    objects as before, with the same bits."""
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values}
    old = {name: module._parameters[leaf] for name, (module, leaf) in places.items()}
    try:
        for name, value in values.items():
            module, leaf = places[name]
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for name, (module, leaf) in places.items():
            module._parameters[leaf] = old[name]


def check_plain(model: Gemma2) -> None:
    """Raises ValueError for a model with twins: they may hold matrices in forms of their own, or copies of them."""
    kinds = dict(PLAIN)
    for number in range(model.config.num_hidden_layers):
        layer = f"model.layers.{number}"
        kinds |= {layer: Block, f"{layer}.self_attn": Attention, f"{layer}.mlp": MLP}
        kinds |= {name.removesuffix(".weight"): nn.Linear for name in _names(number)}
    for path, kind in kinds.items():
        module = model.get_submodule(path)
        if type(module) is not kind:
            raise ValueError(
                f"the atlas puts other matrices into A, and A has a {type(module).__name__} at {path}: load A without "
                "weights=, fast= and adapter="
            )


class _Passes:
    """A text in windows, what A says of it, and the KL of the model as it is now from that.

    Attributes:
        plain: the residual stream of A before each layer, of each batch of windows: [b t d].
    """

    def __init__(self, model: Gemma2, cut: Cut) -> None:
        self.model, self.cut, self.head = model, cut, head_of(model)
        self.targets = torch.tensor(cut.ids, device=model.device)
        self.plain = self.residuals()
        self.states = [self._after(number, streams, len(streams) - 1) for number, streams in enumerate(self.plain)]

    def residuals(self) -> list[list[Tensor]]:
        """Of each batch of windows, the residual stream before each layer and after the last."""
        found = []
        for number in range(len(self.cut.batches)):
            streams = [self.model.model.embed_tokens(self._tokens(number))]
            for layer in range(self.model.config.num_hidden_layers):
                streams.append(self._layer(number, layer, streams[-1]))
            found.append(streams)
        return found

    def kl(self, streams: Sequence[Sequence[Tensor]], first: int) -> float:
        """Mean KL from A, of the model as it is now. `streams` are right before layer `first`; before layer 0 they are
        made anew."""
        total, done = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        for number, before in enumerate(streams):
            states, wanted = self._after(number, before, first), self.states[number]
            after = self.targets[done : done + len(states)]
            total += compare_states(self.head, wanted, self.model, states, after, done)[0].double().sum()
            done += len(states)
        return float(total) / done

    def _after(self, number: int, streams: Sequence[Tensor], first: int) -> Tensor:
        """What the head reads at the tokens of a batch that are scored, [n d]."""
        x = streams[first] if first else self.model.model.embed_tokens(self._tokens(number))
        for layer in range(first, self.model.config.num_hidden_layers):
            x = self._layer(number, layer, x)
        x, rows = self.model.model.norm(x), self.cut.batches[number]
        return torch.cat([row[len(row) - (end - start) :] for row, (_, start, end) in zip(x, rows, strict=True)])

    def _tokens(self, number: int) -> Tensor:
        return self.cut.tokens(self.cut.batches[number], self.model.device)

    def _layer(self, number: int, layer: int, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        inner, slots = self.model.model, NoCache(self.model.config).layers[layer]
        made: Tensor = inner.layers[layer](x, positions, inner.rotary_emb(positions, x.dtype), slots)
        return made


def _check_same_shapes(a: Gemma2, b: Gemma2, names: Sequence[str]) -> None:
    for name in names:
        try:
            shapes = [tuple(_weight(model, name).shape) for model in (a, b)]
        except AttributeError:
            raise ValueError(f"the atlas is of a model and its quantized form: B has no {name}") from None
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the atlas is of a model and its quantized form: {name} is {shapes[0]} in A, {shapes[1]} in B"
            )
    if a.config.layer_types != b.config.layer_types:
        raise ValueError("the atlas is of a model and its quantized form: A and B have other kinds of layers")


def _matrices(model: Gemma2) -> Iterator[tuple[str, int | None]]:
    """Names of the matrices with their layer, in the model's order."""
    yield EMBEDDING, None
    for layer in range(model.config.num_hidden_layers):
        for name in _names(layer):
            yield name, layer


def _names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{part}.{kind}.weight" for kind, part in KINDS.items()]


def _kind(name: str) -> str:
    return name.split(".")[-2]


def _weight(model: Gemma2, name: str) -> Tensor:
    found: Tensor = model.get_submodule(name.rpartition(".")[0]).weight  # type: ignore[assignment]
    return found


def _like(own: Tensor, values: Tensor) -> Tensor:
    """Values in the dtype and on the device of A's: no copy where they are so; those of a form are made."""
    return values.detach().to(own.device, own.dtype)


def _error(own: Tensor, other: Tensor) -> float:
    rows = max(1, ROWS // own.shape[1])
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for a, b in zip(own.split(rows), other.split(rows), strict=True):
        a, b = a.cpu().double(), b.cpu().double()
        sums += torch.stack([(b - a).square().sum(), a.square().sum()])
    return float((sums[0] / sums[1]).sqrt()) if sums[1] else 0.0
