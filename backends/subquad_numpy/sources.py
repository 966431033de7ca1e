"""Cannot be imported where the package lacks its .py files, of which kernels are compiled."""

from pathlib import Path

import subquad_numpy

if __loader__.get_source(__name__) is None:
    msg = f"kernels are compiled from the .py files of {Path(subquad_numpy.__file__).parent}, and it has none"
    raise ImportError(msg)
