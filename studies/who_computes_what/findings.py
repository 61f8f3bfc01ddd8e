"""What implementations were found to compute instead, and what a user can do about it.

A cure stands here only if a run of this study or the implementation's own source shows it. A report is named only if it
was read and tells of the same fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from studies.who_computes_what.changes import (
    Change,
    added_mask,
    as_torchtune,
    changed,
    early_shift,
    own_chunk,
    swapped,
    with_cache,
    without_score_cap,
)
from studies.who_computes_what.models import CAPACITY, RUNS

ALL = frozenset(RUNS)
ONE_PASS = frozenset({"12", "64"})
PAST = frozenset({"64, prefill 32", "64, prefill 8"})
LONG = PAST | {"64"}
CACHED = PAST | {"12, prefill 6"}
NO_REPORT = "No report of this fault was found."
NO_CURE = "No workaround is known."
ISSUES = "https://github.com/{}/issues/{}".format
PULLS = "https://github.com/{}/pull/{}".format
HF, LENS, LITGPT = "huggingface/transformers", "TransformerLensOrg/TransformerLens", "Lightning-AI/litgpt"


@dataclass(frozen=True)
class Finding:
    """What an implementation was seen to compute instead.

    Attributes:
        key: names the change that is injected; if that is another, so must be the key, and the runs are made again.
        runs: in which it differs; seen in others, or in fewer, it is not the same finding.
        brief: in a few words.
        what: in sentences.
        instead: our model with that change, or the name of a numerics profile, to compare with; None if the runs alone
            are the evidence.
        short, cure: what a user can do, in a few words and in sentences.
        report: where it is reported.
    """

    key: str
    runs: frozenset[str]
    brief: str
    what: str
    instead: Change | str | None
    short: str
    cure: str
    report: str = NO_REPORT


UNCAPPED = Finding(
    "no score cap",
    ALL,
    "attention scores are not capped",
    "Attention scores are not capped.",
    without_score_cap,
    '`attn_implementation="eager"`',
    'Load the model with `attn_implementation="eager"`, which computes Gemma 2 as published in 5.20.2 and 4.57.1, or '
    "use "
    "5.23.0, which chooses eager by itself. In the source, `sdpa` is refused from 5.21.0 on.",
    f"Known since 2024: [#32865]({PULLS(HF, 32865)}) made eager attention the default for this reason; in 4.57.1 and "
    "5.20.2 it is not.",
)
UNCAPPED_AND_SHORT = Finding(
    "no score cap",
    ALL,
    "attention scores are not capped; no decoding beyond the window",
    "Attention scores are not capped. With its HybridCache, decoding beyond the window fails.",
    without_score_cap,
    "a newer version, with eager attention",
    'Use 4.57.1 or 5.20.2 with `attn_implementation="eager"`, or 5.23.0.',
    f"The cap: [#32865]({PULLS(HF, 32865)}). {NO_REPORT.replace('this fault', 'the failing decoding in this version')}",
)
SHORT = Finding(
    "decoding fails",
    PAST,
    "as published, as far as it runs; no decoding beyond the window",
    "As published in one pass. With its HybridCache, decoding beyond the window fails.",
    None,
    "a newer version, or `use_cache=False`",
    'Use 4.57.1 or 5.20.2 with `attn_implementation="eager"`, or 5.23.0. In this version, `use_cache=False` computes '
    "every token as published, slowly.",
)
EARLY_SHIFT = Finding(
    "early shift",
    frozenset({"64, prefill 8"}),
    "when decoding fills the window, local layers lose a key one step early and see an empty slot instead",
    "As published in one pass. When decoding fills the window of its HybridCache, local layers lose a key one step "
    "early and see an empty slot of zeros in its place. One window later all is right again.",
    with_cache(early_shift),
    "a newer version, or `use_cache=False`",
    'Use 4.57.1 or 5.20.2 with `attn_implementation="eager"`, or 5.23.0. In this version, `use_cache=False` computes '
    "every token as published, slowly, and a prompt that is longer than the window is not affected.",
    f"[#37574]({ISSUES(HF, 37574)}), closed as repaired by [#38046]({PULLS(HF, 38046)}).",
)
HF_SWAPPED = Finding(
    "swapped layers",
    LONG,
    "local and global layers are swapped; no decoding beyond the window",
    "Local and global layers are swapped, and decoding beyond the window fails.",
    swapped,
    "a newer version",
    'Use 4.57.1 or 5.20.2 with `attn_implementation="eager"`, or 5.23.0.',
    f"Repaired by [#31775]({PULLS(HF, 31775)}), which reports both faults.",
)
GGUF_SCALE = Finding(
    "query scale 256",
    ALL,
    "query scale 256^-0.5, where the model's is another (here 18^-0.5, in 27B 144^-0.5)",
    "The query scale is 256^-0.5, where this model's is 18^-0.5. A GGUF does not state the scale, and the default is "
    "taken. 2B and 9B have 256 and are not affected; 27B has 144.",
    changed(query_pre_attn_scalar=256),
    "convert it with `gemma2 convert`",
    "Write the file as a folder, `gemma2 convert FILE.gguf FOLDER`, and open that folder: the same model computes as "
    "published from a folder (see [transformers 5.23.0, a folder of 46 layers](#as-published)).",
)
TABLE_GELU = Finding(
    "llama.cpp",
    ALL,
    "as published, with GELU from a table of 16-bit numbers",
    "Gemma 2 in llama.cpp's arithmetic, which takes GELU from a table of 16-bit numbers.",
    "llama.cpp",
    "no setting changes it; the difference is small",
    "No setting changes this: the table is chosen when llama.cpp is compiled (`GGML_GELU_FP16` in "
    "`ggml/src/ggml-cpu/vec.h`). To compare with llama.cpp to rounding, use `--numerics llama.cpp` of this project.",
    f"[#29252]({ISSUES('ggml-org/llama.cpp', 29252)}), open.",
)
OWN_CHUNK = Finding(
    "own chunk",
    CACHED,
    "with a cache, earlier tokens are ignored",
    "As published in one pass. With the cache that it returns, a query sees no keys but those of its own chunk. "
    "Decoding one token at a time, a token sees only itself.",
    with_cache(own_chunk),
    "transformers 5.23.0",
    "Install transformers 5.23.0: with it, the same version of TransformerLens computes as published. With 5.24.0, run "
    "the whole text in one pass.",
)
LENS_SWAPPED = Finding(
    "swapped layers",
    LONG,
    "local and global layers are swapped",
    "Local and global layers are swapped.",
    swapped,
    "TransformerLens 3.9.0",
    "Use TransformerLens 3.9.0, whose HookedTransformer computes as published. In this version, prompts that are not "
    "longer than the window are not affected.",
    f"[#778]({ISSUES(LENS, 778)}), closed.",
)
LITGPT_REPORT = (
    f"[#1672]({ISSUES(LITGPT, 1672)}), open, with a repair proposed in [#2235]({PULLS(LITGPT, 2235)}), not merged."
)
LITGPT_CURE = (
    "No workaround with its cache is known. Without the cache, in one pass, it computes as published. In bfloat16 it "
    "rounds at other places than this project; that is what the run over 64 tokens shows, see the last line."
)
ADDED_MASK = Finding(
    "added mask",
    CACHED,
    "with its cache, later tokens of the prompt are seen",
    "As published in one pass. With its cache, no key that it holds is hidden. The mask is added to capped scores as "
    "numbers: 1 for what should be seen, and 0 for later keys in the same chunk, so that a prompt sees its own future. "
    "A prompt that is longer than the window is refused.",
    with_cache(added_mask(empty=False)),
    "no cache",
    LITGPT_CURE,
    LITGPT_REPORT,
)
ADDED_MASK_EMPTY = Finding(
    "added mask, empty slots",
    CACHED,
    "with its cache, later tokens of a chunk and empty slots are seen",
    "As published in one pass. With its cache, where it is given positions but not their end, no key is hidden. The "
    "mask is added to capped scores as numbers: 1 for what should be seen, and 0 for later keys in the same chunk and, "
    f"in global layers, for the empty slots (zeros; {CAPACITY} slots here). A prompt that is longer than the window is "
    "refused.",
    with_cache(added_mask(empty=True)),
    "no cache",
    LITGPT_CURE,
    LITGPT_REPORT,
)
TORCHTUNE = Finding(
    "torchtune",
    ALL,
    "attention scores are capped at 30; the other cap is on the hidden state, not on logits; norms around the MLP are "
    "swapped; decoding sees the first keys, not the last",
    "Attention scores are capped at 30 instead of 50. A cap of 50 is on what the head reads, and logits are not "
    "capped. The norms before and after the MLP have each other's weights. With its cache, local layers count the "
    "window from a query's row in its chunk: decoding one token at a time, each token sees the first keys, as many as "
    "the window holds.",
    as_torchtune,
    "no workaround known",
    NO_CURE,
)
XLA = Finding(
    "jax",
    ONE_PASS,
    "as published in XLA's arithmetic: a coarser tanh, and 1 + w in the weights' dtype",
    "Gemma 2 in XLA's arithmetic. Its tanh is up to 4.3 ulp off, which shows in float32 where logits are capped. 1 + w "
    "is rounded to the weights' dtype, which shows in bfloat16.",
    "jax",
    "nothing is needed",
    "Nothing needs to be done: this is Google's own arithmetic. To compare with it to rounding, use `--numerics jax` "
    "of this project.",
)
