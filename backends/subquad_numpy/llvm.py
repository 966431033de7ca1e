"""Cannot be imported where llvmlite cannot compile kernels: an old one, or one whose LLVM does not load."""

import llvmlite
from llvmlite import binding

if not hasattr(binding, "create_pass_builder"):
    msg = f"kernels need llvmlite 0.44 or newer, and {llvmlite.__version__} is installed"
    raise ImportError(msg)
