"""The rows of the papers' tables compute what their names say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rows.libraries import relative_error

import subquad

torch = pytest.importorskip("torch")
N = 512


def test_exact_rows_agree() -> None:
    from asv_benchmarks.papers import nystromformer

    q, k, v = nystromformer.draw(N)
    unfused, fused = (make(q, k, v)() for make in (nystromformer.unfused, nystromformer.fused))
    assert relative_error(unfused.numpy(), fused.numpy()) < 1e-6


def test_longformer_sees_128_keys_to_each_side() -> None:
    pytest.importorskip("transformers")
    from asv_benchmarks.papers import nystromformer

    q, k, v = (x.double() for x in nystromformer.draw(N))
    position = torch.arange(N)
    visible = (position[:, None] - position).abs() <= 128
    exact = torch.softmax((q @ k.mT / math.sqrt(64)).masked_fill(~visible, -math.inf), -1) @ v
    run = nystromformer.longformer(*nystromformer.draw(N))
    with torch.no_grad():
        for _ in range(2):  # it works in place: a second call must see the same queries
            out = run()[0].unflatten(-1, (8, 64)).transpose(0, 1)
            assert relative_error(out.numpy(), exact[0].numpy()) < 1e-6


def test_nystrom_rows_agree() -> None:
    """Up to the start of the pseudo-inverse, which transformers' layer shares among heads."""
    pytest.importorskip("transformers")
    from asv_benchmarks.papers import nystromformer
    from asv_benchmarks.peers.attention import transformers_nystrom

    q, k, v = nystromformer.draw(N)
    with torch.no_grad():
        theirs = transformers_nystrom(q, k, v)()[0].unflatten(-1, (8, 64)).transpose(0, 1)
        ours = nystromformer.ours(subquad.Nystrom(num_landmarks=64))(q, k, v)()[0]
    assert relative_error(ours.numpy(), theirs.numpy()) < 0.05


def test_longformer_rows_agree() -> None:
    pytest.importorskip("transformers")
    from asv_benchmarks.papers import nystromformer

    q, k, v = nystromformer.draw(N)
    with torch.no_grad():
        theirs = nystromformer.longformer(q, k, v)()[0].unflatten(-1, (8, 64)).transpose(0, 1)
        ours = nystromformer.ours(subquad.Window(left=128))(q, k, v)()[0]
    assert relative_error(ours.numpy(), theirs.numpy()) < 1e-5


@pytest.mark.parametrize("name", ["mamba", "nystromformer", "performer"])
def test_every_row_makes_a_call(name: str) -> None:
    import importlib

    module = importlib.import_module(f"asv_benchmarks.papers.{name}")
    for package in module.PAPER.packages:
        pytest.importorskip(package.replace("-", "_"))
    for row in module.PAPER.rows:
        out = row.make(N)()
        assert all(torch.isfinite(x).all() for x in (out if isinstance(out, tuple) else [out])), row.name
    assert set(module.PAPER.baselines) <= {row.name for row in module.PAPER.rows}


def test_crossover_lies_between_the_lengths_where_the_order_changes() -> None:
    pytest.importorskip("mambapy")
    from asv_benchmarks.papers.mamba import ATTENTION, SCAN, crossover

    def rows(**times: Any) -> list[dict[str, Any]]:
        names = {"scan": SCAN, "attention": ATTENTION}
        return [
            {"name": names[name], "n": 2**i, "ms": {"median": x}}
            for name, xs in times.items()
            for i, x in enumerate(xs)
        ]

    found = crossover(rows(scan=[4.0, 4.0, 4.0, 4.0], attention=[1.0, 2.0, 8.0, 16.0]))
    assert found == pytest.approx(2**1.5)
    assert crossover(rows(scan=[1.0, 1.0], attention=[2.0, 3.0])) is None


def test_the_length_of_the_summary_has_all_its_rounds() -> None:
    from asv_benchmarks.papers.paper import Paper, Row, times

    row = Row("row", lambda n: lambda: n, 256)
    paper = Paper("", "", [row], [128, 256], [], [], ["row"], summary=256)
    rounds = {found["n"]: found["rounds"] for found in times(paper, paper.lengths, repeat=7, seconds=0)}
    assert rounds == {128: 2, 256: 7}
