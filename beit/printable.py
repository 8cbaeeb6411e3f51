"""Foreign text, made fit for a terminal, a log line and a UTF-8 file."""

import re

MAX_CHARACTERS = 500

# control characters, among them line ends and escape sequences; what turns the direction of writing
# or separates lines; halves of characters, which stand for bytes of a file name that are no UTF-8
_UNPRINTABLE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def printable(text: str, *, limit: int = MAX_CHARACTERS) -> str:
    """The text on one line, with \\x1b for what would act; cut in the middle if too long."""
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]}...({len(text) - 2 * half:,} characters)...{text[-half:]}"
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_lines(text: str) -> str:
    """The text with its lines as they are, and whatever else would act made visible."""
    return "\n".join(printable(line, limit=len(line)) for line in text.split("\n"))
