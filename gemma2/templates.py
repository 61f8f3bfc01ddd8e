"""Chat templates: whether one writes Gemma's turns. A template is read as text, and never run."""

from __future__ import annotations

import re

NOT_GEMMAS = (
    "the chat template of this checkpoint is not Gemma's: chat sends Gemma's turns; to send the template's own, write "
    "them into a prompt for generate(special=True)"
)
LONGEST = 200_000  # characters; Gemma's template has 600
START, END = "<start_of_turn>", "<end_of_turn>"
COMPUTED = "\0"  # stands for whatever a tag computes
# What turns of other models begin or end with: ChatML and Phi, Llama, Zephyr, Command-R, Granite, Megrez; DeepSeek
# (between full-width bars); EXAONE; Mistral and Llama 2; Gemma 4; Alpaca; Vicuna.
OTHERS = re.compile(
    r"<\|(?:im_\w+|user|assistant|system|end|endoftext|(?:start|end)_header_id|header_(?:start|end)|eot|eot_id|"
    r"(?:START|END)_OF_TURN_TOKEN|\w+_TOKEN|(?:start|end)_of_role|role_(?:start|end)|turn)\|?>|<turn\|>"
    r"|<\uff5c[^<>\uff5c]{1,40}\uff5c>|\[\|\w{1,20}\|\]|\[/?INST\]|<</?SYS>>|\[gMASK\]|</s>"
    r"|###\s*(?:Instruction|Response|Human|Assistant|User)\b|\b(?:USER|ASSISTANT):|\b(?:Human|Assistant):\s"
)
# The open turn of the model, at the end of a prompt: with a newline, or with something computed behind it.
OPEN_TURN = re.compile(rf"{START}\s*model(?:\s*\n|{COMPUTED})")
OTHER_NAME = re.compile(rf"{START}\s*(?:assistant|bot|gpt|ai)\b", re.IGNORECASE)
MODEL_ALONE = re.compile(rf"(?:^|{COMPUTED})model\n?(?:$|{COMPUTED})")  # the name by which a role is replaced
SPELLED_NEWLINE = re.compile(r"(?<!\\)\\+n")  # a backslash and an n, however often a file escaped it
TAG = re.compile(r"\{[{%#]")
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\"""", re.DOTALL)
IN_TAG = re.compile(r"""['"]|[-+]?[}%]\}""")


def is_gemmas(template: str) -> bool:
    """Whether a Jinja template writes Gemma's turns, `<start_of_turn>user` and `<start_of_turn>model`.

    True for the templates of Gemma and Gemma 2, and for variants of them: with a system message merged into the user's
    turn, minified, with comments, with marks for training. False for turns of any other model, also where a template
    names `<start_of_turn>` in a comment alone.
    """
    if len(template) > LONGEST:
        return False
    written = _written(SPELLED_NEWLINE.sub("\n", template))
    if START not in written or END not in written or OTHERS.search(written) or OTHER_NAME.search(written):
        return False
    if START + "model" in written:
        return OPEN_TURN.search(written) is not None
    return MODEL_ALONE.search(written) is not None


def _written(template: str) -> str:
    """What a template can write: its text and the quoted strings of its tags, in order. Comments are left out, and
    `COMPUTED` stands where something else may come between two strings."""
    out, place = [], 0
    while found := TAG.search(template, place):
        out.append(template[place : found.start()])
        if found[0] == "{#":
            end = template.find("#}", found.end())
            place = end + 2 if end >= 0 else len(template)
            continue
        place = _tag(template, found.end(), out, joins=found[0] == "{{")
    return "".join(out) + template[place:]


def _tag(template: str, place: int, out: list[str], joins: bool) -> int:
    """Add the strings of the tag whose content begins at `place`, and return where the tag ends. In `{{ }}` strings
    with a plus between them are one; in `{% %}` each stands alone."""
    between = place
    while found := IN_TAG.search(template, place):
        computes = not joins or template[between : found.start()].strip() not in ("", "+", "~")
        if found[0] not in "'\"":
            out.append(COMPUTED if joins and computes else "")
            return found.end()
        quoted = QUOTED.match(template, found.start())
        if quoted is None:  # a quotation mark without its second one
            break
        out += [COMPUTED if computes else "", quoted[0][1:-1], "" if joins else COMPUTED]
        place = between = quoted.end()
    return len(template)
