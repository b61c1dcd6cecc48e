"""Text on a terminal: what a model or a file says is shown, never obeyed."""

import unicodedata

# Formatting characters that reorder or hide what stands around them ("Trojan Source", CVE-2021-42574).
_DECEIVING = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def printable(text: str) -> str:
    """The text with control characters written out: an escape sequence could rewrite the screen or fill the
    clipboard. Newlines and tabs stay."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) == "Cc" or character in _DECEIVING:
        return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
    return character
