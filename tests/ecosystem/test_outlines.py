"""outlines: text that obeys a grammar, through transformers' face."""

from __future__ import annotations

import re
from typing import Any

from tests.ecosystem.conftest import needs

outlines = needs("outlines")

REGEX = "(king|queen)-[a-z]{3,8}-[0-9]{2,4}"  # no spaces: for tokens that begin with one outlines counts two


def test_the_text_obeys_the_grammar_and_is_that_of_transformers_own_model(
    face: Any, theirs: Any, their_tokenizer: Any
) -> None:
    texts = [
        outlines.from_transformers(model, their_tokenizer)("And God said", outlines.regex(REGEX), max_new_tokens=24)
        for model in (face, theirs)
    ]
    assert re.fullmatch(REGEX, texts[0]) and texts[0] == texts[1]
