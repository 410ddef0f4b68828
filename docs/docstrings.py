"""Docstrings are in Sphinx's manner, as torch's are; the site is Markdown."""

import re
from textwrap import dedent, indent
from typing import Any

import griffe

MATH = re.compile(r"^( *)\.\. math::\n\n?((?:\1 +.*\n|\n)+)", re.MULTILINE)
ROLE = re.compile(r":(?!math)\w+:`~?([^`]+)`")


def markdown(text: str) -> str:
    """Roles become code, formulas what MathJax reads."""

    def formula(found: re.Match[str]) -> str:
        # One paragraph: a blank line would end it.
        lines = [line for line in dedent(found[2]).splitlines() if line.strip()]
        return indent("\n".join(["$$", *lines, "$$", "", ""]), found[1])

    text = MATH.sub(formula, text + "\n")
    return ROLE.sub(r"`\1`", re.sub(r":math:`([^`]+)`", r"$\1$", text)).rstrip()


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
