"""Names that come from files, as they are shown: what would steer whoever shows them is written out."""

from __future__ import annotations

import re

_STEERS = re.compile(
    # Control characters; line and paragraph separators; what turns the direction of writing; halves of
    # characters, which names of files hold that are not UTF-8.
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def make_visible(text: str, lines: bool = False) -> str:
    r"""Text with control characters as Python writes them: `\x1b`, `\n`.

    Args:
        text: What is shown.
        lines: Whether it is more than a cell or a name: its line ends stay.
    """

    def write_out(match: re.Match[str]) -> str:
        found = match[0]
        return found if lines and found == "\n" else found.encode("unicode_escape").decode()

    return _STEERS.sub(write_out, text)
