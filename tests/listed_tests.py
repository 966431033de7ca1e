"""`pytest -p listed_tests FILES`: of what these files hold, the tests that a list names, in the order of the list.

The variable SUBQUAD_TESTS is the path of the list, a name in each line. Pytest takes names as arguments too, and then looks
through a file once for each of them: thousands of names take it minutes, files and a list seconds. A name that no file
holds is an error of usage.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the listed tests alone."""
    names = Path(os.environ["SUBQUAD_TESTS"]).read_text().splitlines()
    found = {item.nodeid: item for item in items}
    if absent := [name for name in names if name not in found]:
        msg = f"no test of these names: {', '.join(absent)}"
        raise pytest.UsageError(msg)
    items[:] = [found[name] for name in names]
