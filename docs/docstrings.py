"""Docstrings are in Sphinx's manner, as torch's are; the site is Markdown."""

import re
from textwrap import dedent, indent
from typing import Any

import griffe
from latex2mathml.converter import convert

MATH = re.compile(r"^( *)\.\. math::\n\n?((?:\1 +.*\n|\n)+)", re.MULTILINE)
ROLE = re.compile(r":(?!math)\w+:`~?([^`]+)`")


def markdown(text: str) -> str:
    """Roles become code, formulas what browsers show by themselves."""

    # Of a \\begin{aligned} the converter knows only the older name.
    text = text.replace("{aligned}", "{split}")

    def formula(found: re.Match[str]) -> str:
        return (
            indent(convert(" ".join(dedent(found[2]).split()), display="block"), found[1]) + "\n\n"
        )

    text = MATH.sub(formula, text + "\n")
    text = re.sub(r":math:`([^`]+)`", lambda found: convert(found[1]), text)
    return ROLE.sub(r"`\1`", text).rstrip()


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
