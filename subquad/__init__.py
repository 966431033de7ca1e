"""subquad: sequence operators whose cost grows more slowly than the square of the length, on any array library.

Importing it loads next to nothing: what a public name stands for is loaded when the name is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subquad.attention import (
        LSH,
        METHODS,
        Auto,
        BigBird,
        Clustered,
        Crossover,
        ErrorEstimate,
        Exact,
        Favor,
        Linear,
        Linformer,
        Method,
        Nystrom,
        PoorApproximation,
        Window,
        attention,
        attention_weights,
        estimate_error,
        measure_crossover,
    )
    from subquad.blocks import check_mamba, init_mamba, init_mamba2, mamba, mamba2
    from subquad.explain import Explanation, explain
    from subquad.models import load_model
    from subquad.random import draw_omega
    from subquad.scans import (
        ScanErrorEstimate,
        causal_conv1d,
        causal_conv1d_step,
        delta_rule,
        delta_rule_step,
        discretize,
        estimate_scan_error,
        every,
        gated_linear_attention,
        gated_linear_attention_step,
        linear_scan,
        linear_scan_step,
        lti_scan,
        lti_scan_step,
        merge_scan,
        selective_scan,
        selective_scan_step,
        ssd,
        ssd_step,
        summarize_scan,
        wkv,
        wkv_step,
    )

__version__ = "0.1.0"

__all__ = [
    "LSH",
    "METHODS",
    "Auto",
    "BigBird",
    "Clustered",
    "Crossover",
    "ErrorEstimate",
    "Exact",
    "Explanation",
    "Favor",
    "Linear",
    "Linformer",
    "Method",
    "Nystrom",
    "PoorApproximation",
    "ScanErrorEstimate",
    "Window",
    "attention",
    "attention_weights",
    "causal_conv1d",
    "causal_conv1d_step",
    "check_mamba",
    "delta_rule",
    "delta_rule_step",
    "discretize",
    "draw_omega",
    "estimate_error",
    "estimate_scan_error",
    "every",
    "explain",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "init_mamba",
    "init_mamba2",
    "linear_scan",
    "linear_scan_step",
    "load_model",
    "lti_scan",
    "lti_scan_step",
    "mamba",
    "mamba2",
    "measure_crossover",
    "merge_scan",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "summarize_scan",
    "wkv",
    "wkv_step",
]

_HOMES = {
    "subquad.attention": (
        "LSH METHODS Auto BigBird Clustered Crossover ErrorEstimate Exact Favor Linear Linformer Method Nystrom "
        "PoorApproximation Window attention attention_weights estimate_error measure_crossover"
    ),
    "subquad.blocks": "check_mamba init_mamba init_mamba2 mamba mamba2",
    "subquad.explain": "Explanation explain",
    "subquad.models": "load_model",
    "subquad.random": "draw_omega",
    "subquad.scans": (
        "ScanErrorEstimate causal_conv1d causal_conv1d_step delta_rule delta_rule_step discretize "
        "estimate_scan_error every gated_linear_attention gated_linear_attention_step linear_scan linear_scan_step "
        "lti_scan lti_scan_step merge_scan selective_scan selective_scan_step ssd ssd_step summarize_scan wkv "
        "wkv_step"
    ),
}
_ROOMS = ("backend", "blocks", "core", "kernels", "models", "random", "registry", "scans")
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


class _Package(ModuleType):
    """The package, in which a function stays what its name stands for when a module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(_HOME[name]), name)
            setattr(sys.modules[__name__], name, value)
            return value
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg, name=name, obj=sys.modules[__name__])


sys.modules[__name__].__class__ = _Package

# A library that the program has imported learns our operators now: it looks those of a saved program up by name.
_loaded = ((name, module) for name, module in [*sys.modules.items()] if "." not in name and name[0] != "_")
if any(name not in {*sys.stdlib_module_names, "numpy", __name__} and hasattr(x, "__path__") for name, x in _loaded):
    from subquad.core.loading import load_imported

    load_imported()
