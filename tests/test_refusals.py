"""What cannot be computed as it was meant is refused, by an error that names the argument and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, Strict, Torch, relative_error

import subquad
from subquad import registry

FEW = [pytest.param(x, id=str(x)) for x in (NumPy(), Strict(), Torch(), Jax())]


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_a_mask_that_fits_two_ways_is_refused(method: str) -> None:
    mask = np.ones((3, 10), dtype=bool)
    options = {"num_landmarks": 4} if method == "nystrom" else {}
    for batch in ((3, 3), (3, 1), (3, 2, 3)):
        q = np.random.default_rng(0).standard_normal((*batch, 10, 4))
        with pytest.raises(ValueError, match=r"key_mask has shape \(3, 10\) beside arrays of batch shape"):
            subquad.attention(q, q, q, method, key_mask=mask, **options)
        for full in (
            mask.reshape(3, *[1] * (len(batch) - 1), 10),
            mask[(None,) * (len(batch) - 1)][..., : batch[-1], :],
        ):
            assert subquad.attention(q, q, q, method, key_mask=full, **options).shape == q.shape
    q = np.random.default_rng(0).standard_normal((2, 3, 10, 4))  # one reading alone: a mask of each head
    assert subquad.attention(q, q, q, method, key_mask=mask, **options).shape == q.shape
    grouped = np.random.default_rng(0).standard_normal((2, 4, 10, 4))
    with pytest.raises(ValueError, match="key_mask has shape"):
        subquad.attention(grouped, grouped[:, :2], grouped[:, :2], method, key_mask=mask[:2], **options)


def test_a_mask_that_fits_two_ways_is_refused_everywhere() -> None:
    q, mask = np.ones((3, 3, 10, 4)), np.ones((3, 10), dtype=bool)
    with pytest.raises(ValueError, match="key_mask has shape"):
        subquad.Linear().summarize(q, q, key_mask=mask)
    with pytest.raises(ValueError, match="key_mask has shape"):
        subquad.Linear().step(q, q, q, key_mask=mask)
    with pytest.raises(ValueError, match="query_mask has shape"):
        subquad.attention(q, q, q, "nystrom", num_landmarks=2, query_mask=mask)


def test_the_advice_on_scales_is_right() -> None:
    """A scale given as an array is multiplied into queries and keys, by its root each, for every method."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 20, 4))
    scale = np.asarray([0.3, 2.0])[:, None, None]
    with pytest.raises(TypeError, match="multiply q and k by its square root"):
        subquad.attention(q, k, v, "linear", scale=scale)
    for method in registry.METHODS:
        options = {"num_landmarks": 3} if method == "nystrom" else {}
        got = subquad.attention(scale**0.5 * q, scale**0.5 * k, v, method, scale=1, **options)
        for i in range(2):
            right = subquad.attention(q[i], k[i], v[i], method, scale=float(scale[i, 0, 0]), **options)
            assert relative_error(got[i], right) < 1e-12


TORCH_TENSORS = {
    "nested": lambda torch: torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)], layout=torch.jagged),
    "nested-strided": lambda torch: torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(5, 4)]),
    "sparse": lambda torch: torch.eye(4).to_sparse(),
    "csr": lambda torch: torch.eye(4).to_sparse_csr(),
    "quantised": lambda torch: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch calls these layouts prototypes
@pytest.mark.parametrize("kind", TORCH_TENSORS)
def test_layouts_that_cannot_be_computed_with(kind: str) -> None:
    torch = pytest.importorskip("torch")
    x, plain = TORCH_TENSORS[kind](torch), torch.rand(5, 4)
    word = {"nested-strided": "nested", "csr": "layout", "sparse": "layout"}.get(kind, kind)
    for call, name in (
        (lambda: subquad.attention(x, x, x, "exact"), "q"),
        (lambda: subquad.attention(plain, plain, x, "favor"), "v"),
        (lambda: subquad.Linear().summarize(x, x), "k"),
        (lambda: subquad.linear_scan(plain, x), "b"),
        (lambda: subquad.selective_scan(x, plain, plain, plain, plain), "u"),
    ):
        with pytest.raises(TypeError, match=rf"^{name} is a .*{word}"):
            call()


def test_numbers_and_pairs_that_no_option_can_be() -> None:
    q = np.ones((5, 4))
    for method, options in (
        ("exact", {"scale": 10**400}), ("favor", {"num_features": 10**400}), ("nystrom", {"num_landmarks": 2**70}),
        ("nystrom", {"iterations": 10**400}), ("nystrom", {"pinv": "ridge", "ridge": 10**400}),
        ("nystrom", {"pinv": "exact", "rcond": 10**400}), ("favor", {"features": "relu", "kernel_epsilon": 10**400}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{list(options)[-1]} must be .* got an integer of \d+ bits"):
            subquad.attention(q, q, q, method, **options)
    for option, make in (("center", subquad.Favor), ("landmarks", subquad.Nystrom)):
        for pair in ((None, None), (q, None), (None, q)):
            with pytest.raises(TypeError, match=rf"{option}\[\d\] .* is a NoneType, not an array"):
                make(**{option: pair})
    state = subquad.Linear().summarize(q, q)
    for shift in (np.ones(3), np.ones(()), np.ones((7, 1)), np.ones((2, 1))):
        for pair in (({**state, "shift": shift}, state), (state, {**state, "shift": shift})):
            with pytest.raises(ValueError, match=r"\['shift'\] ends in"):
                subquad.Linear().merge(*pair)


@pytest.mark.parametrize("library", FEW)
def test_integers_of_any_size_are_numbers(library: Library) -> None:
    q = np.random.default_rng(0).standard_normal((12, 4))
    for method, big, same in (
        ("nystrom", {"num_landmarks": 3, "pinv": "ridge", "ridge": 2**70}, {"ridge": 2.0**70}),
        ("nystrom", {"num_landmarks": 3, "pinv": "exact", "rcond": 2**70}, {"rcond": 2.0**70}),
        ("favor", {"features": "relu", "kernel_epsilon": 2**70}, {"kernel_epsilon": 2.0**70}),
        ("exact", {"scale": 2**70}, {"scale": 2.0**70}),
        ("favor", {"seed": 2**70}, {}),
    ):
        found = [
            library.numpy(library.call(lambda q, o=o, m=method: subquad.attention(q, q, q, m, **o), q, dtype="float32"))
            for o in (big, {**big, **same})
        ]
        assert np.array_equal(*found, equal_nan=True)  # in float32 a sum of such numbers may overflow


NARROW: dict[str, dict[str, int]] = {  # options whose sums and products leave eight bits
    "window": {"left": 100, "dilation": 3},
    "bigbird": {"block_size": 16, "num_random_blocks": 2, "window_blocks": 3},
    "lsh": {"bucket_size": 32, "num_rounds": 2},
    "clustered": {"cluster_size": 16, "chunk": 16, "opened": 250, "spans": 2, "window": 8, "sinks": 4},
    "favor": {"num_features": 200},
    "nystrom": {"num_landmarks": 200},
    "linformer": {"rank": 100},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", NARROW)
def test_numbers_of_numpy_are_numbers_of_python(method: str) -> None:
    """A sum of np.uint8 would wrap around: the windows were wrong, and a loop of "clustered" did not end."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 600, 8))
    forms = (False, True) if registry.method_row(method).cls.causal is True else (False,)
    for causal in forms:
        expected = subquad.attention(q, k, v, method, causal=causal, **NARROW[method])
        for number in (np.uint8, np.int64):
            options = {name: number(x) for name, x in NARROW[method].items()}
            assert np.array_equal(subquad.attention(q, k, v, method, causal=causal, **options), expected)
            assert registry.make_method(method, options) == registry.make_method(method, NARROW[method])


HUGE = {
    "window": [{"left": 2**31}, {"left": 2**62, "right": 2**40}, {"left": 2**31 - 1, "dilation": 1}],
    "bigbird": [{"window_blocks": 2**40 + 1}, {"block_size": 2**40}, {"num_random_blocks": 2**20}],
    "lsh": [{"bucket_size": 2**40}],
    "clustered": [{"chunk": 2**40, "opened": 2**40}, {"cluster_size": 2**40}, {"window": 2**31, "opened": 2**31}],
}


@pytest.mark.parametrize(("method", "options"), [(method, o) for method, every in HUGE.items() for o in every])
def test_a_size_beyond_the_sequence_means_all_of_it(method: str, options: dict[str, int]) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 8))
    for causal in (False,) if "right" in options else (False, True):
        for n in (300, 40):
            got = subquad.attention(q[:, :n], k, v, method, causal=causal, **options)
            assert relative_error(got, subquad.attention(q[:, :n], k, v, "exact", causal=causal)) < 1e-13


def test_a_dilation_beyond_the_sequence_leaves_a_row_its_own_key() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 60, 8))
    for dilation in (60, 10**3, 2**33):
        got = subquad.attention(q, k, v, "window", left=3, dilation=dilation)
        assert relative_error(got, v) < 1e-15
        assert relative_error(subquad.attention(q[:5], k, v, "window", left=3, dilation=dilation), v[-5:]) < 1e-15
