"""The tokenizer beside an adapter: training programs save there the one that the adapter was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gemma2.checkpoints.beside import TOKENIZER, template_notes, turns_of
from gemma2.checkpoints.checkpoint import TOKENIZERS, Checkpoint, tokenizer_for
from gemma2.checkpoints.vocabulary import check_vocabulary, same_tokenizer
from gemma2.errors import BadModelFile
from gemma2.templates import NOT_GEMMAS


def with_tokenizer_of(opened: Checkpoint, adapter: Path) -> Checkpoint:
    """The checkpoint with the tokenizer, the chat template and the end ids that are beside an adapter. A line in
    `notes` says what was taken, or why it was not."""
    if not any((adapter / name).is_file() for name in TOKENIZERS):
        return opened
    theirs = opened.tokenizer
    try:
        found = tokenizer_for(adapter, None)
        if len(found) > max(opened.config.vocab_size, len(theirs)):
            rows = f"it has {len(found)} pieces, and the embedding has {opened.config.vocab_size} rows"
            raise BadModelFile(f"{rows}; tokenizer={str(adapter)!r} uses it all the same")
        found = check_vocabulary(found, opened.config)
        turns = turns_of(adapter, found)
    except BadModelFile as error:
        return replace(
            opened, notes=(*opened.notes, f"the tokenizer beside the adapter {adapter} is not used: {error}")
        )
    template, ends = turns.chat_template, turns.end_ids
    known = opened.end_ids | theirs.end_ids
    other = {
        "tokenizer": not same_tokenizer(found, theirs),
        "chat template": template not in (None, opened.chat_template),
        "end ids": not ends <= known,
    }
    taken = [name for name, differs in other.items() if differs]
    if not taken:
        return opened
    notes = tuple(note for note in opened.notes if note != NOT_GEMMAS or template is None)
    listed = " and ".join(filter(None, (", ".join(taken[:-1]), taken[-1])))
    verb = "is" if taken in (["tokenizer"], ["chat template"]) else "are"
    said = f"the {listed} beside the adapter {adapter} {verb} used; tokenizer= takes another"
    settings = {name: content for name, content in turns.companions.items() if name == TOKENIZER}
    return replace(
        opened,
        tokenizer=found if other["tokenizer"] else theirs,
        chat_tuned=opened.chat_tuned if turns.chat_tuned is None else turns.chat_tuned,
        chat_template=template or opened.chat_template,
        end_ids=opened.end_ids | ends,
        notes=(*notes, said, *found.notes, *turns.notes, *template_notes(template)),
        companions={**opened.companions, **settings},
    )
