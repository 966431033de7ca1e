"""What is compared: a method with its options, or the selective scan, as the text after `--methods` says."""

import ast
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import subquad
from subquad.attention import ALIASES
from subquad.cli import definitions
from subquad.cli.errors import CommandError, unknown
from subquad.cli.inputs import Inputs

# What is shown unless `--methods` says otherwise: small and larger, so that the picture shows what size buys.
DEFAULT = (
    "exact",
    "favor:num_features=64",
    "favor:num_features=256",
    "nystrom:num_landmarks=32",
    "nystrom:num_landmarks=64",
    "linear",
    "selective_scan",
)
SIZES = ("num_features", "num_landmarks")  # options that say how large a method is: shown as a bare number
D_STATE = 16


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention method with its options."""

    method: str
    options: Mapping[str, Any]
    operator: Any
    causal: bool
    task = "attention"

    @property
    def function(self) -> Callable[..., Any]:
        """What is timed, a function of `arrays`."""
        return lambda q, k, v: subquad.attention(q, k, v, self.operator, causal=self.causal)

    def arrays(self, inputs: Inputs) -> tuple[np.ndarray, ...]:
        """Arguments of `function` and `reference`."""
        return inputs.q, inputs.k, inputs.v

    def reference(self, *arrays: np.ndarray) -> np.ndarray:
        """Exact attention in float64, whatever the method."""
        return definitions.attention(*arrays, causal=self.causal)

    def error_of_mean(self, reference: np.ndarray, q: np.ndarray, _k: np.ndarray, v: np.ndarray) -> float:
        """Error of answering the mean of v: a method above it has learnt nothing from q and k."""
        return definitions.relative_error(definitions.mean_of_values(q, v, causal=self.causal), reference)


@dataclasses.dataclass(frozen=True)
class Scan:
    """A selective scan driven by the same activations.

    u = v; delta = k P with P drawn once, biased to steps of 0.05; B and C are the first channels of k and of the
    first query head that reads it; A = −1 … −16 and D = 1: the sizes and time scales that Mamba starts from.
    """

    seed: int
    method = "selective_scan"
    task = "selective_scan"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Any]:
        """What is timed, a function of `arrays`."""
        return lambda u, delta, A, B, C, D, bias: subquad.selective_scan(
            u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True
        )

    def arrays(self, inputs: Inputs) -> tuple[np.ndarray, ...]:
        """Arguments of `function` and `reference`."""
        q, k, u = inputs.q, inputs.k, inputs.v
        if q.ndim > 2:
            q = q[..., :: q.shape[-3] // k.shape[-3], :, :]
        d, d_v = k.shape[-1], u.shape[-1]
        d_state = min(D_STATE, d)
        projection = np.random.Generator(np.random.PCG64(self.seed)).standard_normal((d, d_v)) / d**0.5
        delta = k @ projection
        A = np.tile(-np.arange(1.0, d_state + 1), (d_v, 1))
        bias = np.full(d_v, np.log(np.expm1(0.05)))  # softplus(bias) = 0.05
        arrays = (u, delta, A, k[..., :d_state], q[..., :d_state], np.ones(d_v), bias)
        return tuple(np.ascontiguousarray(x, dtype=np.float32) for x in arrays)

    def reference(self, *arrays: np.ndarray) -> np.ndarray:
        """The recurrence itself in float64."""
        return definitions.selective_scan(*arrays)


Case = Attention | Scan


def label(case: Case) -> str:
    """Name of a case in tables, e.g. "favor 256"."""
    words = [str(value) if name in SIZES else f"{name}={value}" for name, value in case.options.items()]
    return " ".join([case.method, *words])


def parse(text: str | None, *, causal: bool, seed: int, inputs: Inputs) -> tuple[list[Case], list[str]]:
    """Cases of `--methods`, and notes on what was left out of the default ones.

    `text` is "method[:option=value[:option=value…]],…"; None asks for the default.
    """
    cases: list[Case] = []
    left_out: dict[str, list[str]] = {}
    for item in DEFAULT if text is None else (part.strip() for part in text.split(",")):
        case = _parse_one(item, causal=causal, seed=seed)
        reason = _declines_causal(case, inputs) if causal else None
        if reason is None:
            if case not in cases:
                cases.append(case)
        elif text is None:
            left_out.setdefault(reason, []).append(label(case))
        else:
            msg = f"--methods {item!r} with --causal: {reason}; leave one of the two out"
            raise CommandError(msg)
    return cases, [f"{', '.join(names)} left out: {reason}" for reason, names in left_out.items()]


def _parse_one(item: str, *, causal: bool, seed: int) -> Case:
    method, *settings = item.split(":")
    argument = f"--methods {item!r}"
    if "=" in method:
        msg = f"{argument}: options are joined to their method by colons: favor:num_features=64:seed=1"
        raise CommandError(msg)
    if method == Scan.method:
        if settings:
            msg = f"{argument}: selective_scan takes no options here; leave out {':'.join(settings)!r}"
            raise CommandError(msg)
        return Scan(seed)
    method = ALIASES.get(method, method)
    if method not in subquad.METHODS:
        msg = f"--methods: {unknown('method', method, [*subquad.METHODS, *ALIASES, Scan.method])}"
        raise CommandError(msg)
    kind: Any = subquad.METHODS[method]
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            msg = f"{argument}: {setting!r} is no option; expected name=value, e.g. favor:num_features=64"
            raise CommandError(msg)
        if name not in fields:
            msg = f"{argument}: {unknown(f'option of {method}', name, fields)}"
            raise CommandError(msg)
        options[name] = _value(value)
    try:
        operator = kind(**options)
    except (TypeError, ValueError, NotImplementedError) as error:
        msg = f"{argument}: {error}"
        raise CommandError(msg) from error
    if "seed" in fields and "seed" not in options:
        with contextlib.suppress(ValueError):  # a method refuses a seed that would change nothing
            operator = kind(**options, seed=seed)
    return Attention(method, options, operator, causal)


def _value(text: str) -> Any:
    """A Python literal where it is one (64, 0.5, True), else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _declines_causal(case: Case, inputs: Inputs) -> str | None:
    """Ask the method itself, on two tokens of NumPy's; any other fault is for the measurement to report."""
    with contextlib.suppress(Exception):
        try:
            case.function(*case.arrays(inputs.first(2)))
        except NotImplementedError as reason:
            return str(reason)
    return None
