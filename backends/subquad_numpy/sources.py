"""Cannot be imported where the package lacks its .py files, of which kernels are compiled."""

import linecache

linecache.lazycache(__file__, globals())  # for a zip file
if not linecache.getlines(__file__):
    msg = f"kernels are compiled from .py files, and there are none beside {__file__}"
    raise ImportError(msg)
