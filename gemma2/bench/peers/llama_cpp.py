"""llama.cpp through llama-cpp-python, as its own programs run it by default: float16 keys and values, flash attention
where it has it, a ring for local layers, prompts in pieces of 512. On the processor."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma2.errors import BadModelFile

try:
    import llama_cpp
except (
    ImportError,
    RuntimeError,
    OSError,
) as error:  # the last two: its compiled part is missing or of another machine
    raise ImportError(f"llama.cpp is not installed: pip install 'gemma2[llama-cpp]' ({error})") from None

AT_ONCE = 2048  # columns that one call takes, llama.cpp's default


class LlamaCppRunner:
    """A `Runner` over llama.cpp's C functions."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self._threads = threads or torch.get_num_threads()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, _: None)  # it prints pages of notes
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise BadModelFile(f"{path}: llama.cpp does not load it")
        weakref.finalize(self, llama_cpp.llama_model_free, self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.versions: Mapping[str, str] = {"llama-cpp-python": llama_cpp.__version__}
        built = llama_cpp.llama_print_system_info().decode()
        self.notes: tuple[str, ...] = (f"llama.cpp was built with: {built.strip().rstrip('|').strip()}",)
        self.weights = int(llama_cpp.llama_model_size(self._model))
        self.cache_bytes = 2
        self._context: Any = None
        self._free: Callable[[], object] = lambda: None  # the context that is in use

    def start(self, batch: int, capacity: int) -> None:
        self._free()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = -(-capacity // 256) * 256 * batch, batch
        options.n_batch = max(AT_ONCE, batch)
        options.n_threads = options.n_threads_batch = self._threads
        options.swa_full = False
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {batch} rows of {capacity} token ids")
        self._free = weakref.finalize(self, llama_cpp.llama_free, self._context)
        self._fed = 0

    def feed(self, ids: Tensor) -> Tensor:
        t, start = ids.shape[1], self._fed
        every = [
            (token, start + at, row, at == t - 1)
            for row, line in enumerate(ids.tolist())
            for at, token in enumerate(line)
        ]
        found = []
        for begin in range(0, len(every), AT_ONCE):
            found += self._decode(every[begin : begin + AT_ONCE])
        self._fed += t
        return torch.stack(found)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[Tensor]:
        """Logits [v] of the tokens that ask for them, each with its position, its row and whether it does."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            for n, (token, position, row, wanted) in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.logits[n] = token, position, wanted
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
            batch.n_tokens = len(tokens)
            code = llama_cpp.llama_decode(self._context, batch)
            if code:
                raise RuntimeError(f"llama.cpp: llama_decode ended with {code}")
            return [self._logits(n) for n, (*_, wanted) in enumerate(tokens) if wanted]
        finally:
            llama_cpp.llama_batch_free(batch)

    def _logits(self, number: int) -> Tensor:
        address = llama_cpp.llama_get_logits_ith(self._context, number)
        flat = (ctypes.c_float * self._vocabulary).from_address(ctypes.addressof(address.contents))
        return torch.frombuffer(flat, dtype=torch.float32).clone()
