"""Cases to compare and measure: every method and every scan of the registry, with options."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import subquad
import subquad.attention
import subquad.scans  # these fill the registry
from subquad import registry
from subquad.cli import definitions
from subquad.cli.errors import CommandError, unknown
from subquad.cli.inputs import Inputs

HEADS, D = 4, 64  # sizes of the queries, keys and values that `Attention.random` draws


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of a public function: its arrays by name, in the order of its arguments, and its options."""

    function: Callable[..., Any]
    arrays: Mapping[str, np.ndarray]
    options: Mapping[str, Any]

    @property
    def positional(self) -> int:
        """The number of arrays, counted from the first, that the function takes by position alone."""
        parameters = inspect.signature(self.function).parameters
        return sum(x.kind is x.POSITIONAL_ONLY for name, x in parameters.items() if name in self.arrays)

    def bind(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """The call as a function of the arrays alone, of the problem's function or of `function` in its place."""
        count, run, options = self.positional, function or self.function, dict(self.options)
        keywords = list(self.arrays)[count:]
        return lambda *arrays: run(*arrays[:count], **dict(zip(keywords, arrays[count:], strict=True)), **options)


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention method with its options; `seed` is used if the method is random and `options` has no seed."""

    name: str
    options: Mapping[str, Any]
    causal: bool = False
    seed: int | None = None
    task = "attention"

    @property
    def label(self) -> str:
        """Name in tables, e.g. "favor 256": the option that sets the size is shown by its value alone."""
        words = [str(value) if name == self.row.size else f"{name}={value}" for name, value in self.options.items()]
        return " ".join([self.name, *words])

    @property
    def row(self) -> Any:
        """The row of the method in the registry."""
        return registry.method_row(self.name)

    def random(self, n: int) -> Problem:
        """Self-attention of HEADS heads and n tokens on normal random numbers; every call draws equal numbers."""
        rng = np.random.default_rng(0)
        return self._problem(*(rng.standard_normal((HEADS, n, D), dtype=np.float32) for _ in range(3)))

    def real(self, inputs: Inputs) -> Problem:
        """Attention of the queries, keys and values given."""
        return self._problem(inputs.q, inputs.k, inputs.v)

    def reference(self, problem: Problem) -> np.ndarray:
        """Exact attention in float64: the reference of every method."""
        return definitions.attention(*problem.arrays.values(), causal=self.causal)

    def _problem(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Problem:
        seed = {} if self.seed is None else {"seed": self.seed}
        options = {"method": self.name, "causal": self.causal, **self.options, **seed}
        return Problem(subquad.attention, {"q": q, "k": k, "v": v}, options)


@dataclasses.dataclass(frozen=True)
class Scan:
    """One scan, on inputs that its row of the registry draws or makes of activations."""

    name: str
    row: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def task(self) -> str:
        """Name of the quantity computed, the scan's own: no other operator has this reference."""
        return self.name

    @property
    def label(self) -> str:
        """Name in tables."""
        return self.name

    def random(self, n: int) -> Problem:
        """The scan on example inputs of n steps; every call draws equal numbers."""
        return self._problem(*self.row.draw(np.random.default_rng(0), n))

    def real(self, inputs: Inputs) -> Problem:
        """The scan on inputs made of queries, keys and values."""
        return self._problem(*self.row.inputs(inputs.q, inputs.k, inputs.v))

    def reference(self, problem: Problem) -> np.ndarray:
        """The definition in float64; if the registry has none, the scan of the inputs in float64."""
        wide = {name: x.astype(np.promote_types(x.dtype, np.float64)) for name, x in problem.arrays.items()}
        if self.row.reference is not None:
            return self.row.reference(wide, problem.options)
        return dataclasses.replace(problem, arrays=wide).bind()(*wide.values())

    def _problem(self, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> Problem:
        single = {np.dtype(np.float64): np.float32, np.dtype(np.complex128): np.complex64}
        narrow = {name: np.ascontiguousarray(x, single.get(x.dtype, x.dtype)) for name, x in arrays.items()}
        return Problem(self.row.function, narrow, options)


Case = Attention | Scan


def find_case(name: str, options: Mapping[str, Any], *, causal: bool = False, seed: int | None = None) -> Case:
    """The operator of a name with its options; a random method whose options have no seed gets `seed`.

    Raises
    ------
    ValueError, TypeError
        For an operator, option or value that does not exist; the message names it and what exists.
    """
    if name in registry.SCANS:
        if options:
            msg = f"{name} takes no options here; leave out {', '.join(options)}"
            raise TypeError(msg)
        return Scan(name, registry.SCANS[name])
    try:
        row = registry.method_row(name)
    except ValueError:
        raise ValueError(unknown("method", name, [*registry.METHODS, *registry.ALIASES, *registry.SCANS])) from None
    registry.make_method(name, options)
    seed = None if "seed" in options or "seed" not in row.options else seed
    if seed is not None:
        try:
            registry.make_method(name, {**options, "seed": seed})
        except ValueError:  # a method raises for a seed that has no effect, as Nyström with segment means
            seed = None
    return Attention(row.name, options, causal, seed)


def is_quadratic(case: Case) -> bool:
    """Whether the operator's time grows with the square of the length."""
    return re.search(r"\bn(²|\^2| n\b| n_kv\b)", case.row.cost) is not None


def reason_against_causal(case: Case) -> str | None:
    """The reason why an operator has no causal form; None if it has one, as all scans do."""
    causal = True if isinstance(case, Scan) else registry.METHODS[case.name].causal
    return None if causal is True else f"{case.name} has no causal form: {causal}"


def shown() -> list[tuple[str, Mapping[str, Any]]]:
    """The names and options that are compared by default, without `--methods`."""
    names = sorted(registry.METHODS, key=lambda name: name != "exact")  # the reference first
    methods = [(name, options) for name in names for options in registry.method_row(name).defaults or ({},)]
    return [*methods, *((name, {}) for name in registry.SCANS)]


def parse(text: str | None, *, causal: bool, seed: int) -> tuple[list[Case], list[str]]:
    """(cases of `--methods`, notes on default cases that were left out).

    `text` is "method[:option=value[:option=value…]],…"; None means the default cases.
    """
    cases: list[Case] = []
    left_out: dict[str, list[str]] = {}
    items = [part.strip() for part in text.split(",")] if text is not None else []
    wanted = shown() if text is None else [(item, _split(item)) for item in items]
    for item, options in wanted:
        try:
            case = find_case(item.partition(":")[0], options, causal=causal, seed=seed)
        except (TypeError, ValueError, NotImplementedError) as error:
            msg = f"--methods {item!r}: {error}"
            raise CommandError(msg) from error
        reason = reason_against_causal(case) if causal else None
        if reason is None:
            if case not in cases:
                cases.append(case)
        elif text is None:
            left_out.setdefault(reason, []).append(case.label)
        else:
            msg = f"--methods {item!r} with --causal: {reason}; leave one of the two out"
            raise CommandError(msg)
    return cases, [f"{', '.join(names)} left out: {reason}" for reason, names in left_out.items()]


def _split(item: str) -> dict[str, Any]:
    """The options of one item, "method:option=value…", as a dict; values that are no Python literal stay strings."""
    method, *settings = item.split(":")
    if "=" in method:
        msg = f"--methods {item!r}: options are joined to their method by colons: favor:num_features=64:seed=1"
        raise CommandError(msg)
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            msg = f"--methods {item!r}: {setting!r} is no option; expected name=value, e.g. favor:num_features=64"
            raise CommandError(msg)
        try:
            options[name] = ast.literal_eval(value)  # 64, 0.5, True
        except (ValueError, SyntaxError):
            options[name] = value
    return options
