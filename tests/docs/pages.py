"""What the tests of the pages share."""

import re


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of this language in a page of Markdown."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
