"""Lets the API pages show docstrings as they are meant, where Markdown or its Google style would see something else."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*?(?=\n\n|\Z)", flags=re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r"^(Reference: .*)\n +", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Puts doctests into code blocks, since `>>>` would be a quotation, and a reference of two lines into one."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that has just been read."""
        if obj.docstring:
            text = _REFERENCE.sub(r"\1 ", obj.docstring.value)
            obj.docstring.value = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
