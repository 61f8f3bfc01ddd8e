"""Gemma 2 in plain PyTorch: exact, readable, open at every place. Start with `gemma2.load()`."""

import sys

# `python -m gemma2` reads this file, and PyTorch with it, before __main__.py; argv[0] is "-m" until then.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "gemma2":
    from gemma2_command import end_quietly

    end_quietly()

from gemma2.cache import HybridCache
from gemma2.checkpoints.hf_config import config_dict, published_config, read_config
from gemma2.config import Gemma2Config
from gemma2.convert import convert, save
from gemma2.errors import BadModelFile, ContextOverflow, NonFiniteError
from gemma2.gemma import Gemma
from gemma2.inspect import inspect
from gemma2.load import load
from gemma2.model import Gemma2
from gemma2.research.face import as_transformers
from gemma2.sampling import Sampling
from gemma2.scoring import Score
from gemma2.stats import Stats
from gemma2.talk import Talk
from gemma2.tokenizer import Tokenizer
from gemma2.tokens import left_padded

__all__ = [
    "BadModelFile",
    "ContextOverflow",
    "Gemma",
    "Gemma2",
    "Gemma2Config",
    "HybridCache",
    "NonFiniteError",
    "Sampling",
    "Score",
    "Stats",
    "Talk",
    "Tokenizer",
    "as_transformers",
    "config_dict",
    "convert",
    "inspect",
    "left_padded",
    "load",
    "published_config",
    "read_config",
    "save",
]
