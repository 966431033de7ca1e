"""One step through all layers of a Mamba model: residual blocks with a norm before each, as one kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subquad.backend import Array
from subquad.blocks.mamba import OPTIONAL, REQUIRED, checked_form
from subquad.core.dtypes import compute_dtype
from subquad.core.states import State
from subquad.kernels.mamba_step import mamba_step
from subquad.scans.call import Form, Target, form_of

# the arrays of a layer in the order of the kernel, after its norm and before its states
KEYS = (
    "in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
    "dt_proj.bias", "A_log", "D", "out_proj.weight", "out_proj.bias",
)  # fmt: skip
TAPS = 1 + KEYS.index("conv1d.weight")  # place in a layer, after the norm
COUNT = 1 + len(KEYS) + 2  # arrays of a layer


def can_step(layers: Sequence[Mapping[str, Any]], states: Sequence[Any]) -> bool:
    """Whether `step_layers` can take the layers: they have states, and the parameters of blocks alone."""
    for layer, state in zip(layers, states, strict=True):
        mixer = layer["mixer"]
        if state is None or len(state) != 2 or "conv" not in state or "ssm" not in state:
            return False
        if len(mixer) != sum(key in mixer for key in KEYS) or any(mixer.get(key) is None for key in REQUIRED):
            return False
    return True


def step_layers(
    x: Array, layers: Sequence[Mapping[str, Any]], states: Sequence[State], eps: float
) -> tuple[Array, tuple[State, ...]]:
    """(x, states) after one step of x (..., 1, d_model) through all layers.

        x ← x + mamba(norm.weight ∘ x / √(mean(x²) + eps))        for each layer

    A layer has "norm.weight" (d_model,) and "mixer", the parameters of `subquad.mamba`. Errors are those of `mamba`.
    """
    arrays: list[Any] = [x]
    for layer, state in zip(layers, states, strict=True):
        mixer = layer["mixer"]
        arrays += (layer["norm.weight"], *[mixer.get(key) for key in KEYS], state["conv"], state["ssm"])
    form = form_of("mamba layers", arrays, lambda: _form(x, layers, states))
    x, *given = form.enter(arrays)
    for place in range(TAPS, len(given), COUNT):
        taps = given[place]
        assert taps is not None
        given[place] = taps[:, 0, :]
    with form.computing(x):
        out, *found = mamba_step(x[:, 0, :], *given, eps=eps)
    found = [form.leave(1 + i, a) for i, a in enumerate(found)]
    new = tuple({"conv": conv, "ssm": ssm} for conv, ssm in zip(found[::2], found[1::2], strict=True))
    return form.leave(0, out), new


def _form(x: Array, layers: Sequence[Mapping[str, Any]], states: Sequence[State]) -> Form:
    """The form of a call, after the checks of each block."""
    targets: list[Target | None] = []
    outputs: list[Target] = []
    forms: list[Form] = []
    for layer, state in zip(layers, states, strict=True):
        given = {name: layer["mixer"].get(name) for name in (*REQUIRED, *OPTIONAL)}
        form = checked_form(x, given, {f"state[{name!r}]": state[name] for name in ("conv", "ssm")})
        of_x, *of_params, of_conv, of_ssm = form.targets
        if targets and of_x != targets[0]:
            batch = tuple(state["conv"].shape[:-2])
            msg = f"state of layer {len(forms)} is of a batch of shape {batch}, which x and the layers before are not"
            raise ValueError(msg)
        by_name = dict(zip(given, of_params, strict=True))
        norm = layer["norm.weight"]
        if tuple(norm.shape) != (x.shape[-1],):
            msg = f"norm.weight has shape {tuple(norm.shape)}, expected ({x.shape[-1]},): d_model as x has"
            raise ValueError(msg)
        dtype = compute_dtype(form.xp, x, norm)
        if not targets:
            targets.append(of_x)
            outputs.append(form.outputs[0])
        targets += (Target(dtype), *(by_name[key] for key in KEYS), of_conv, of_ssm)
        outputs += form.outputs[1:]
        forms.append(form)
    return Form(forms[0].xp, tuple(targets), tuple(outputs))
