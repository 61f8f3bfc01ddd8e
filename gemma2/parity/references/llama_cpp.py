"""llama.cpp through llama-cpp-python: the nodes of its graph, each as it is computed.

A node is known by its operation and the name that llama.cpp gives it (src/models/gemma2.cpp, src/llama-graph.cpp of
llama-cpp-python 0.3.36). Keys and values are float32 and flash attention is off, since flash attention forms no scores.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.checkpoints.checkpoint import Checkpoint, open_checkpoint
from gemma2.checkpoints.export import layout_for, write
from gemma2.checkpoints.gguf_weights import GGUFWeights
from gemma2.errors import BadModelFile
from gemma2.numerics import storage_of
from gemma2.numerics.changes import Storage
from gemma2.parity.references import CannotDo, parse_row, parse_sites, spans
from gemma2.research.sites import LAYER
from gemma2.research.sites import sites as all_sites

try:
    import llama_cpp
    from llama_cpp._ggml import libggml
except (
    ImportError,
    RuntimeError,
    OSError,
) as error:  # the last two: its compiled part is missing or of another machine
    raise ImportError(f"llama.cpp is not installed: pip install llama-cpp-python ({error})") from None

KINDS = {torch.bfloat16: "BF16", torch.float16: "F16"}  # of the file made of what is no GGUF; else F32
F32 = llama_cpp.GGML_TYPE_F32
WINDOW = b"gemma2.attention.sliding_window"
# Node -> the sites that nodes of this name are, in the order in which they come.
INSIDE = {
    "RMS_NORM norm-{i}": ("ln1.hook_normalized", "ln1_post.hook_normalized", "ln2.hook_normalized"),
    "MUL attn_norm-{i}": ("ln1",),
    "MUL_MAT Qcur-{i}": ("attn.hook_q",),
    "MUL_MAT Kcur-{i}": ("attn.hook_k",),
    "MUL_MAT Vcur-{i}": ("attn.hook_v",),
    "ROPE Qcur-{i}": ("attn.hook_rot_q",),
    "ROPE Kcur-{i}": ("attn.hook_rot_k",),
    "MUL_MAT kq-{i}": ("attn.hook_scores_raw",),  # of queries that were scaled before
    "SOFT_MAX kq_soft_max-{i}": ("attn.hook_pattern",),
    "CONT kqv_out-{i}": ("attn.hook_z",),
    "MUL attn_post_norm-{i}": ("hook_attn_out",),
    "ADD sa_out-{i}": ("hook_resid_mid",),
    "MUL ffn_norm-{i}": ("ln2",),
    "MUL_MAT ffn_gate-{i}": ("mlp.hook_pre",),
    "MUL_MAT ffn_up-{i}": ("mlp.hook_pre_linear",),
    "GEGLU ffn_geglu-{i}": ("mlp.hook_post",),
    "ADD l_out-{i}": ("hook_resid_post",),
}
OUTSIDE = {
    "SCALE inp_scaled": ("hook_embed",),
    "MUL result_norm": ("ln_final",),
    "SCALE result_output": ("logits",),
}
UNNAMED = "node_"  # and a number: what a node is called that has no name
ERROR = 4  # GGML_LOG_LEVEL_ERROR


class _Node(ctypes.Structure):
    """The beginning of `struct ggml_tensor` (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # sizes, the fastest first
        ("nb", ctypes.c_size_t * 4),  # strides in bytes
    )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    found = getattr(libggml, name)
    found.restype, found.argtypes = result, arguments
    return found


_name = _function("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_operation = _function("ggml_op_desc", ctypes.c_char_p, ctypes.c_void_p)
_bytes = _function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_read = _function(
    "ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)  # wherever the node lies, on the processor or not


def value_of(node: int) -> Tensor:
    """A copy of a float32 node, its slowest axis first, as PyTorch counts: [x y t d] for sizes d, t, y, x."""
    described = _Node.from_address(node)
    raw = torch.empty(_bytes(node) // 4, dtype=torch.float32, device="cpu")
    _read(node, raw.data_ptr(), 0, raw.nbytes)
    return raw.as_strided(tuple(described.ne)[::-1], [stride // 4 for stride in described.nb[::-1]]).clone()


class LlamaCpp:
    """A `Reference` over llama.cpp, on the file itself if it is a GGUF, else on one made of it for the purpose: of F32
    for float32, BF16 for bfloat16.

    Raises:
        BadModelFile: the checkpoint is what a GGUF cannot state, or llama.cpp does not take it.
    """

    dtype = torch.float32  # of every activation, whatever the weights are stored in

    def __init__(self, opened: Checkpoint, dtype: torch.dtype) -> None:
        kind = KINDS.get(dtype, "F32")
        if not isinstance(opened.weights, GGUFWeights):
            self._folder = tempfile.TemporaryDirectory(prefix="gemma2-")  # goes with the last that refers to it
            opened = _as_gguf(opened, kind, Path(self._folder.name) / "model.gguf")
        assert isinstance(opened.weights, GGUFWeights)
        self.storage: Storage | None = storage_of(opened.weights)
        kinds = sorted(opened.weights.types)
        # Of a split one, the first part.
        self._path = min(opened.weights.files)
        self.config = opened.config
        self._load(None)
        self.system = f"llama.cpp in llama-cpp-python {llama_cpp.__version__}, {'/'.join(kinds)} weights"
        self.versions: Mapping[str, str] = {"llama-cpp-python": llama_cpp.__version__}
        self.longest: int | None = opened.config.max_position_embeddings
        self._nodes = _nodes(opened.config.num_hidden_layers)
        # What a block reads is what the one before it has put out.
        before = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(opened.config.num_hidden_layers - 1))]
        self._same = {f"blocks.{i}.hook_resid_pre": name for i, name in enumerate(before)}
        shown = {name for names in self._nodes.values() for name in names if name}
        self.sites = frozenset(shown | self._same.keys())

    def run(self, ids: Sequence[int], sites: Iterable[str]) -> dict[str, Tensor]:
        parse_row(self, ids)
        wanted = parse_sites(self, sites)
        needed = {self._same.get(name, name) for name in wanted}
        shapes = {name: all_sites(self.config)[name].sizes(self.config, len(ids))[1:] for name in needed}
        seen: dict[str, Tensor] = {}

        def see(name: str, value: Tensor) -> None:
            # Scores are [1 h t s], with s beyond the row: cells of the cache that are empty.
            scores = len(shapes[name]) == 3 and shapes[name][1:] == (len(ids), len(ids))
            seen[name] = (value[..., : len(ids)] if scores else value).reshape(shapes[name]).clone()

        def choose(node: str, number: int) -> str:
            names = self._nodes.get(node, ())
            return names[number] if number < len(names) and names[number] in needed else ""

        self._watch(ids, choose, see)
        missing = needed - seen.keys()
        if missing:
            raise RuntimeError(f"{self.system} has no node for {', '.join(sorted(missing)[:5])}")
        return {name: seen[self._same.get(name, name)] for name in wanted}

    def nodes(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Every node of the graph with float32 values, sites or not, by its operation and name ("MUL_MAT ffn_out-0")
        and from the second of these on its number ("RMS_NORM norm-0 2"), in the order of computation and in llama.cpp's
        own shapes. A view of a cache is what stands in it at the end."""
        parse_row(self, ids)
        seen: dict[str, Tensor] = {}
        self._watch(ids, lambda node, number: f"{node} {number + 1}" if number else node, seen.__setitem__)
        return seen

    def _watch(self, ids: Sequence[int], choose: Callable[[str, int], str], see: Callable[[str, Tensor], None]) -> None:
        """One pass over a row. `choose(node, n)` names the site of the n-th node called `node`, "" for none."""
        watcher = _Watcher(choose, see)
        with self._context(len(ids), watcher=watcher) as context:
            self._decode(context, [(token, at, 0) for at, token in enumerate(ids)])
        if watcher.error:
            raise watcher.error

    def with_window(self, window: int) -> LlamaCpp:
        other = copy(self)
        other.config = replace(self.config, sliding_window=window)
        other._load(window)
        return other

    def cached(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        """Its local layers have rings, as in its own programs, and not all positions, as in its library by default."""
        parse_row(self, ids)
        row = [(token, at, 0) for at, token in enumerate(ids)]
        parts = spans(ids, chunks)
        with self._context(len(ids), batch=max(chunks), swa_full=False) as context:
            return torch.cat([self._decode(context, row[start:stop]) for start, stop in parts])

    def batched(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        for row in rows:
            parse_row(self, row)
        if len(rows) > llama_cpp.llama_max_parallel_sequences():
            raise CannotDo(f"{self.system} takes {llama_cpp.llama_max_parallel_sequences()} rows, not {len(rows)}")
        every = [(token, at, number) for number, row in enumerate(rows) for at, token in enumerate(row)]
        with self._context(max(map(len, rows)), batch=len(every), rows=len(rows)) as context:
            return list(self._decode(context, every).split([len(row) for row in rows]))

    def _load(self, window: int | None) -> None:
        options = llama_cpp.llama_model_default_params()
        if window is not None:
            overrides = (llama_cpp.llama_model_kv_override * 2)()  # the second, without a key, ends them
            overrides[0].tag, overrides[0].key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, WINDOW
            overrides[0].value.val_i64 = window
            options.kv_overrides = overrides
        with _quiet() as said:
            llama_cpp.llama_backend_init()
            self._model = llama_cpp.llama_model_load_from_file(str(self._path).encode(), options)
        if not self._model:
            raise BadModelFile(f"{self._path}: llama.cpp does not load it: {' '.join(said)}")
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)

    @contextmanager
    def _context(
        self,
        length: int,
        batch: int | None = None,
        rows: int = 1,
        swa_full: bool = True,
        watcher: _Watcher | None = None,
    ) -> Iterator[Any]:
        """A context for so many rows of a length. `batch` token ids are computed in one graph; default the row."""
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.swa_full = -(-length // 256) * 256 * rows, rows, swa_full
        options.n_batch = options.n_ubatch = batch or length
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.type_k = options.type_v = F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if watcher:
            options.cb_eval = watcher.callback
        with _quiet() as said:
            context = llama_cpp.llama_init_from_model(self._model, options)
            if not context:
                raise CannotDo(f"{self.system} makes no context for {length} token ids: {' '.join(said)}")
            try:
                yield context
            finally:
                llama_cpp.llama_free(context)

    def _decode(self, context: Any, tokens: Sequence[tuple[int, int, int]]) -> Tensor:
        """Logits [n v] of token ids, each with its position and its row."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            for n, (token, position, row) in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.logits[n] = token, position, 1
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
            batch.n_tokens = len(tokens)
            code = llama_cpp.llama_decode(context, batch)
            if code:
                raise RuntimeError(f"{self.system}: llama_decode ended with {code}")
            size = (len(tokens), self.config.vocab_size)
            logits = llama_cpp.llama_get_logits(context)
            flat = (ctypes.c_float * (size[0] * size[1])).from_address(ctypes.addressof(logits.contents))
            return torch.frombuffer(flat, dtype=torch.float32).view(size).clone()
        finally:
            llama_cpp.llama_batch_free(batch)


class _Watcher:
    """llama.cpp's evaluation callback. It is asked of every node, in the order of the graph, whether its value is
    wanted, and called again with those that are when they are computed."""

    def __init__(self, choose: Callable[[str, int], str], see: Callable[[str, Tensor], None]) -> None:
        self._choose, self._see = choose, see
        self._counts: Counter[str] = Counter()
        self._chosen = ""
        self.error: BaseException | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._called)

    def _called(self, node: int, ask: bool, _: object) -> bool:
        try:
            if ask:
                name = _name(node).decode()
                key = f"{_operation(node).decode()} {UNNAMED if name.startswith(UNNAMED) else name}"
                self._chosen = self._choose(key, self._counts[key]) if _Node.from_address(node).type == F32 else ""
                self._counts[key] += 1
                return bool(self._chosen)
            self._see(self._chosen, value_of(node))
        except BaseException as error:  # it would be lost in the C code that called
            self.error = error
            return False
        return True


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Without llama.cpp's pages of notes; the lines of errors among them. Its log is a setting of the process."""
    errors: list[str] = []

    def note(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(note)
    llama_cpp.llama_log_set(callback, None)
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)


def _nodes(layers: int) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = dict(OUTSIDE)
    for layer in range(layers):
        for node, names in INSIDE.items():
            found[node.replace(LAYER, str(layer))] = tuple(f"blocks.{layer}.{name}" for name in names)
    # The last norms of all blocks have one name, without a number.
    found["RMS_NORM norm"] = (
        *(f"blocks.{i}.ln2_post.hook_normalized" for i in range(layers)),
        "ln_final.hook_normalized",
    )
    found["MUL ffn_post_norm"] = tuple(f"blocks.{i}.hook_mlp_out" for i in range(layers))
    # Products without a name: each layer's attention output before its norm, and the head's.
    found[f"MUL_MAT {UNNAMED}"] = (*[""] * layers, "logits_raw")
    return found


def _as_gguf(opened: Checkpoint, kind: str, path: Path) -> Checkpoint:
    write(layout_for("gguf", opened, kind, "gemma2"), opened, path, lambda written: None)
    return open_checkpoint(path, opened.tokenizer)
