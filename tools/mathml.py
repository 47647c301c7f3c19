"""Formulas of the documentation as MathML, an extension of Python-Markdown.

`pymdownx.arithmatex` finds the formulas, `$…$` in a line and `$$…$$` in a block, and leaves them as
TeX for a script of the page. Here TeX becomes MathML while the site is built, and browsers display
that without a script or a font of another server. GitHub displays the same notation.
"""

import html
import re
from typing import Any

# Only the group `docs` installs it.
from latex2mathml.converter import convert  # pyright: ignore
from markdown import Extension, Markdown
from markdown.postprocessors import Postprocessor

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

_SIGN = re.compile(  # at the beginning, or behind a bracket, a comma or an equals sign
    r"(<mrow>|<mo[^>]*>&#x000(?:28|2C|3D);</mo>)<mo>(?=&#x02212;|&#x0002B;)"
)


class _Formulas(Postprocessor):
    def run(self, text: str) -> str:
        return _FORMULA.sub(_formula, text)


class MathML(Extension):
    """Replace what `pymdownx.arithmatex` (`generic = true`) leaves in a page."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Run after all others, so that every formula is in the text."""
        md.postprocessors.register(_Formulas(md), "mathml", priority=-1)


def makeExtension(**options: Any) -> MathML:
    """The name by which Python-Markdown finds an extension in a module."""
    return MathML(**options)


def _formula(match: re.Match[str]) -> str:
    tex = html.unescape(match["tex"])
    display = "block" if match["tag"] == "div" else "inline"
    mathml = str(convert(tex, display=display))  # pyright: ignore[reportUnknownArgumentType]
    if "\\" in mathml or "&amp;" in mathml:  # the converter copies what it does not know
        raise ValueError(f"the formula {tex!r} has a command without counterpart in MathML")
    # The converter gives every minus the spaces of a subtraction, that of -1 too.
    return _SIGN.sub(r'\1<mo form="prefix">', mathml)
