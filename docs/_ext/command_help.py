"""`.. command-help:: compare` shows what `subquad compare --help` prints, so that the page cannot go stale."""

import contextlib
import io
import os
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive

from subquad.cli import main


class CommandHelp(Directive):
    """The help text of one subcommand as a literal block."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Ask the command itself."""
        text = io.StringIO()
        plain = {"COLUMNS": "88", "NO_COLOR": "1"}
        with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([self.arguments[0], "--help"])
        if not text.getvalue():
            msg = f"subquad {self.arguments[0]} --help printed nothing"
            raise self.error(msg)
        return [nodes.literal_block(text.getvalue(), text.getvalue(), language="none")]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
