"""The page about other implementations, printed from what was found."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping

from studies.who_computes_what.findings import LONG, PAST
from studies.who_computes_what.implementations import BASE, DTYPES, IMPLEMENTATIONS, Implementation
from studies.who_computes_what.models import RUNS, TINY
from studies.who_computes_what.outcomes import LONGEST, Found, Outcome, differing

RIGHT = "as published"
COMMAND = "python -m studies.who_computes_what"
HEAD = """# Which implementations compute Gemma 2 correctly

This page compares other implementations of Gemma 2 with this project's. Each is built by its own code, with the weights
of one small random model, and run over the same token ids. The first table says which compute Gemma 2 as published,
what the others compute instead, and what you can do. Another version than the one named may compute otherwise.

Everything here comes from runs ({machine}; {dates}), not from others' reports. A cause is stated only if injecting the
same change into our model makes the two agree to rounding, and what is left after that is named. The weights are random
and large, so that the caps matter: in a trained model the differences are smaller.

    {command} page > docs/who-computes-what.md                    # from the recorded runs
    {command} run --environments FOLDER                           # all of them anew
    {command} run --environments FOLDER --only 'litgpt 0.5.13'    # one of them

Where it shows: in which use the results differ from the exact ones by more than rounding, in float32 and in bfloat16.
Largest logit difference: the largest distance of a logit to the exact one in those runs. Published logits lie between
-{cap_logits:g} and {cap_logits:g}. "Small" means that no logit is off by more than 0.0001 of the largest in float32, or
0.1 of it in bfloat16. "Hidden by rounding" means that bfloat16's own rounding is larger than the fault. What you can do
holds in both dtypes."""
RUN = """## The runs

The model has the shape of Gemma 2 27B, scaled down: {layers} layers, width {width}, {heads} query heads and {groups}
key/value heads of width {head}, query scale {scale}^-0.5, caps {cap_scores:g} and {cap_logits:g}. Its window is
{window}, where the published models have 4096: what shows here beyond {window} tokens shows there beyond 4096. A
section says so if an implementation was given another model. "Default" means that no attention was asked for; the one
that was chosen stands in brackets.

| run | what is run |
|---|---|
| 12 | one pass over 12 tokens, fewer than the window |
| 64 | one pass over 64 tokens, more than the window |
| 12, prefill 6 | with the implementation's own cache: 6 tokens at once, then 6 one at a time |
| 64, prefill 32 | the same, 32 tokens at once, then 32 one at a time |
| 64, prefill 8 | the same, 8 tokens at once, then 56 one at a time |

| verdict | what it means |
|---|---|
| equal bits | all values are ours, to the bit |
| rounding | the differences are no larger than the dtype explains, by the rule of [`gemma2 parity`](parity.md) |
| **differs**, with a number | they are larger; the number is the largest distance of a logit to the exact one |
| **fails** | the run raised an error, which its section shows |
| **refuses** | the model could not be built; its section shows the error |
| not run | this study has no way to run it |

One pass compares the residual stream and each block's outputs too; with a cache only logits are compared."""


def page(found: Mapping[str, Found]) -> str:
    """Raises ValueError where the runs are of another change than the one that the finding names now."""
    names = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
    names |= {"groups": "num_key_value_heads", "head": "head_dim", "scale": "query_pre_attn_scalar"}
    names |= {"cap_scores": "attn_logit_softcapping", "cap_logits": "final_logit_softcapping"}
    names |= {"window": "sliding_window"}
    numbers = {key: TINY[name] for key, name in names.items()}
    both = [(one, found[one.name]) for one in IMPLEMENTATIONS if one.name in found]
    texts = {"machine": listed(it.machine for _, it in both), "dates": listed(it.date for _, it in both)}
    head, run = filled(HEAD.format(command=COMMAND, **texts, **numbers)), filled(RUN.format(**numbers))
    lines = [head, "", *summary(both), "", run]
    for dtype in DTYPES:
        lines += ["", f"### In {dtype}", "", f"| | {' | '.join(RUNS)} |", "|---" * (len(RUNS) + 1) + "|"]
        for one, it in both:
            if dtype in it.outcomes:
                lines.append(f"| {one.name} | {' | '.join(outcome.cell() for outcome in it.outcomes[dtype])} |")
    right = [(one, it) for one, it in both if told(one, it)[0].startswith(RIGHT) and not one.finding]
    lines += ["", "## As published", "", "Nothing needs to be done with these. To run one of them again:", ""]
    lines += [f"- {one.name}{about(one, it)}: `{again(one)}`" for one, it in right]
    for one, it in both:
        if (one, it) not in right:
            lines += ["", f"## {one.name}", "", *details(one, it)]
    absent = [one.name for one in IMPLEMENTATIONS if one.name not in found]
    if absent:
        lines += ["", "## Not run", "", *(f"- {name}" for name in absent)]
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The text with its paragraphs in lines of one length; tables and code stay."""
    pieces = text.split("\n\n")
    return "\n\n".join(it if it[0] in " |#" else textwrap.fill(it, 120, break_on_hyphens=False) for it in pieces)


def listed(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


def told(one: Implementation, found: Found) -> tuple[str, str]:
    """What it computes, as far as these runs show it: in a few words, and in sentences."""
    outcomes, finding, again = found.outcomes[one.dtypes[0]], one.finding, found.again
    runs = differing(outcomes)
    if all(it.verdict == "refuses" for it in outcomes):
        return "nothing: it refuses", "It refuses to build this model, rather than compute another."
    if not runs and any(it.verdict == "not run" for it in outcomes):
        return f"{RIGHT} in one pass; with a cache not run", "Gemma 2 as published, in one pass."
    if not runs:
        return RIGHT, "Gemma 2 as published."
    if finding is None or not finding.runs <= runs:
        return "something else; not explained", "Something else; not explained."
    if finding.instead is None:
        return finding.brief, finding.what
    if again is None or again.finding != finding.key:
        raise ValueError(f"{one.name}: the runs were not compared with {finding.key!r}; run it again")
    if not again.agree:
        return "something else; not explained", "Something else; not explained."
    agree = f"all {again.of}" if not again.left else f"{again.agree} of {again.of}"
    rest = f"; not explained: {'; '.join(again.left)}" if again.left else ""
    size = f"at most {again.ratio:.2g} times what rounding explains"
    brief = f"{finding.brief}; and something that is not explained, {size}" if again.left else finding.brief
    return brief, (
        f"{finding.what} With this injected into our model, {agree} traces in {one.dtypes[0]} agree to rounding{rest}."
    )


def summary(both: Iterable[tuple[Implementation, Found]]) -> Iterator[str]:
    yield "| implementation | what it computes | where it shows | largest logit difference | what you can do |"
    yield "|---|---|---|---|---|"
    for one, found in both:
        brief, _ = told(one, found)
        right = brief.startswith(RIGHT) and not one.finding
        link = "as-published" if right else anchor(one.name)
        where = by_dtype({dtype: shows(them) for dtype, them in found.outcomes.items()}, "hidden by rounding")
        size = by_dtype({dtype: farthest(them) for dtype, them in found.outcomes.items()}, "")
        todo = one.finding.short if one.finding else "" if right else cure(one)
        yield f"| [{one.name}](#{link}) | {brief} | {where} | {size} | {todo} |"


def by_dtype(values: Mapping[str, str], nothing: str) -> str:
    """One text where the dtypes agree, else one for each."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    stated = {dtype: value or nothing for dtype, value in values.items()}
    return "<br>".join(f"{dtype}: {value}" for dtype, value in stated.items() if value)


def farthest(outcomes: Iterable[Outcome]) -> str:
    largest = max((it.apart for it in outcomes if it.verdict == "differs"), default=0.0)
    return f"{largest:.2g}" if largest else ""


def anchor(heading: str) -> str:
    """The place of a heading in a page, as GitHub names it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def shows(outcomes: Iterable[Outcome]) -> str:
    """In which use the results are others, or are refused."""
    by_verdict: dict[str, set[str]] = {"differs": set(), "small": set(), "fails": set(), "refuses": set()}
    for it in outcomes:
        by_verdict.get("small" if it.small else it.verdict, set()).add(it.run)
    if by_verdict["refuses"]:
        return "when the model is built"
    differs, small, fails = (uses(by_verdict[verdict]) for verdict in ("differs", "small", "fails"))
    return "; ".join(filter(None, (differs, small and f"small: {small}", fails and f"fails: {fails}")))


def uses(runs: set[str]) -> str:
    """What these runs have in common."""
    pieces = []
    if {"12", "12, prefill 6"} <= runs:
        return "every use"
    if runs == LONG:
        return "any use beyond the window"
    if "12" in runs:
        pieces.append("one pass of any length" if "64" in runs else "one pass within the window")
    elif "64" in runs:
        pieces.append("one pass beyond the window")
    if "12, prefill 6" in runs:
        pieces.append("any use of its cache")
    elif runs >= PAST:
        pieces.append("decoding beyond the window")
    elif "64, prefill 32" in runs:
        pieces.append("a prompt longer than the window, with its cache")
    elif "64, prefill 8" in runs:
        pieces.append("decoding beyond the window after a shorter prompt")
    return ", ".join(pieces)


def cure(one: Implementation) -> str:
    return '`attn_implementation="eager"`, the default' if one.refuses else "no workaround known"


def about(one: Implementation, found: Found) -> str:
    same = re.sub(r"\W", "", found.system) == re.sub(r"\W", "", one.name)
    parts = ["" if same else found.system, "" if one.model == "4 layers" else one.model]
    return f" ({'; '.join([*filter(None, parts), f'run on {found.date}'])})"


def again(one: Implementation) -> str:
    return f"{COMMAND} run --environments FOLDER --only '{one.name}'"


def details(one: Implementation, found: Found) -> Iterator[str]:
    """What was found, what to do, where it differs, and how to see it again."""
    finding = one.finding
    yield f"{told(one, found)[1]}{about(one, found)}"
    yield f"\n**What you can do.** {finding.cure if finding else f'Use {cure(one)}.'}"
    if finding:
        yield f"\n**Reported.** {finding.report}"
    yield ""
    lines = [f"- {dtype}, run {line}" for dtype, outcomes in found.outcomes.items() for line in where(outcomes)]
    refusals = {it.said: None for outcomes in found.outcomes.values() for it in outcomes if it.verdict == "refuses"}
    lines += [f"- The error: `{short(said)}`" for said in refusals]
    for dtype, verdicts in found.arithmetic.items():
        compared = ", ".join(f"`{run}` {verdict}" for run, verdict in verdicts.items())
        lines.append(f"- {dtype}, compared with our model in `{one.numerics}`'s arithmetic instead of ours: {compared}")
    if lines:
        yield from [*lines, ""]
    requires = " ".join(f"'{line}'" if "<" in line else line for line in (*BASE, *one.requires))
    yield "```sh"
    yield f"pip install {requires}  # what the next line does"
    yield f"{again(one)}\n```"


def short(error: str) -> str:
    return f"{error} ..." if len(error) >= LONGEST else error


def where(outcomes: list[Outcome]) -> Iterator[str]:
    for it in outcomes:
        if it.verdict == "differs":
            size = it.said or f"{it.ratio:.3g} times what rounding explains"
            position = f", visible in logits from position {it.position}" if it.position >= 0 else ""
            yield f"`{it.run}`: differs first at `{it.first}`, {size}{position}"
        elif it.verdict == "fails":
            yield f"`{it.run}`: fails with `{short(it.said)}`"
