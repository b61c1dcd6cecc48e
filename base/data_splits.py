"""Train, validation and test, fixed for ever by a hash of the prompt.

The unit is the prompt, not the row: what is asked in the SFT file and again in the preference file falls into
the same split, however either file spells it. For plain text the unit is the document, or a section of a long
one.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any

# Documents over LONG characters are split by sections of about SECTION, so that one book (tinyshakespeare has
# a single document of 1.1 M characters) gives every split its share. Both are part of the definition of the
# splits.
SECTION = 8_192
LONG = 8 * SECTION

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def split_of(prompt: Any, validation: float, test: float) -> str:
    """ "train", "validation" or "test" for a prompt (a string, or messages), from its SHA-256.

    `validation` and `test` are the expected shares. Each split grows from its own end of the unit interval:
    changing one size never moves a prompt between the other split and train.
    """
    place = unit_hash(prompt_key(prompt))
    if place < test:
        return "test"
    return "validation" if place >= 1 - validation else "train"


def prompt_key(prompt: Any) -> str:
    """What is asked, without how it is written down: the first user turn, NFC, white space collapsed.

    Later turns do not count, because hh-rlhf and its kin repeat a dialogue at several lengths: the longer
    ones hold the shorter one's prompt, and an answer to it. Nor does the system prompt.
    """
    if not isinstance(prompt, str):
        asked = [message["content"] for message in prompt if message["role"] == "user"]
        prompt = asked[0] if asked else " ".join(message["content"] for message in prompt)
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def unit_hash(key: str, salt: str = "") -> float:
    """A number in [0, 1), the same on every machine and for ever: 53 bits of SHA-256 (what a float holds
    exactly).
    """
    digest = hashlib.sha256((salt + key).encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def split_text(text: str, validation: float, test: float) -> Iterator[tuple[str, str]]:
    """(split, text) of a document: whole, or if long its sections, neighbours of one split joined again.

    The texts in order are the document, character by character.
    """
    sections = _sections(text) if len(text) > LONG else iter([text])
    for split, run in groupby(sections, key=lambda section: split_of(section, validation, test)):
        yield split, "".join(run)


def _sections(text: str) -> Iterator[str]:
    """Cuts at the first blank line after SECTION characters, else at a line end, else anywhere."""
    start = 0
    while len(text) - start > 2 * SECTION:
        blank = _BLANK_LINE.search(text, start + SECTION, start + 2 * SECTION)
        line = text.find("\n", start + SECTION, start + 2 * SECTION) + 1
        end = blank.end() if blank else line or start + SECTION
        yield text[start:end]
        start = end
    yield text[start:]
