"""Formulas as MathML, which browsers set by themselves: no script, no network, and text that can be copied.

docutils translates them; a formula that it does not know is a warning of the build, and stays as it was written.
"""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from docutils.utils.math.unichar2tex import uni2tex_table
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(translate(self, node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula; its box may be scrolled where the page is narrow."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(translate(self, node, as_block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def translate(self: HTML5Translator, node: nodes.Element, *, as_block: bool) -> str:
    """The formula of a node as MathML; letters such as ω may stand for their commands."""
    formula = node.astext()
    try:
        return str(tex2mathml(formula.translate(uni2tex_table), as_block=as_block))
    except MathError as error:
        logger.warning("%s Formula: %s", error, formula, location=node)
        return self.encode(formula)


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
