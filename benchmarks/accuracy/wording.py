"""Names of classes, which are those of people's folders, as Markdown and as matplotlib show them: letter by letter."""

import re

LONGEST_LABEL = 40  # letters that a picture has room for
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|$~&#])")


def in_markdown(name: str) -> str:
    """In a cell of a table; a line break would end it."""
    return MARKDOWN.sub(r"\\\1", in_one_line(name))


def in_picture(name: str) -> str:
    """As a label: between two dollars matplotlib would see mathematics."""
    name = in_one_line(name)
    if len(name) > LONGEST_LABEL:
        name = f"{name[: LONGEST_LABEL - 1]}…"
    return name.replace("$", r"\$")


def in_one_line(name: str) -> str:
    """Without line breaks and what else does not print."""
    return "".join(letter if letter.isprintable() else " " for letter in name)
