#!/usr/bin/env bash
# jax 0.10.2: the attribute x.device of an array split over several devices.
# Expected: in the array API standard x.device may be handed to any creation function, as in
#   zeros(shape, device=x.device), to get an array "where x is".
# Instead: for a split array x.device is its NamedSharding, which is tied to rank and sizes:
#   a vector or a scalar made that way raises IndexError, another size of the split axis
#   raises a ValueError; only fitting shapes work. (Shown with two CPU devices.)
# Seen when run:
#   x.device is a NamedSharding
#   (5,) IndexError list index out of range
#   () IndexError list index out of range
#   (3, 5) IndivisibleError Sharding NamedSharding(mesh=Mesh('s': 2, axis_types=(Auto,))
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

split = NamedSharding(Mesh(jax.devices(), ("s",)), PartitionSpec(None, "s"))
x = jax.device_put(jnp.arange(8.0).reshape(2, 4), split)
assert isinstance(x.device, NamedSharding) and not isinstance(x.device, jax.Device)
print("x.device is a", type(x.device).__name__)
for shape, error in (((2, 4), None), ((5,), IndexError), ((), IndexError), ((3, 5), ValueError)):
    try:
        seen = jnp.zeros(shape, device=x.device).sharding == split
    except Exception as exc:
        seen = type(exc)
        print(shape, type(exc).__name__, str(exc)[:60])
    assert (seen is True) if error is None else issubclass(seen, error)
one = jnp.arange(8.0)
assert isinstance(one.device, jax.Device) and jnp.zeros((), device=one.device).shape == ()
PY
env/bin/python check.py
