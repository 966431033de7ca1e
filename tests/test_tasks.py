"""Synthetic tasks: what their sequences hold, and which arguments they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from subquad import tasks


def test_selective_copying_hides_the_targets_among_noise():
    inputs, targets = tasks.selective_copying(np.random.default_rng(0), batch=50, n=40, tokens=7, vocabulary=9)
    assert inputs.shape == (50, 47)
    assert targets.shape == (50, 7)
    assert inputs.dtype == targets.dtype == np.int64
    assert (inputs[:, 40:] == tasks.COPY).all()
    for row, wanted in zip(inputs[:, :40], targets, strict=True):
        assert (row[row != tasks.NOISE] == wanted).all()
    assert set(np.unique(targets)) == set(range(2, 9))
    places = np.nonzero(inputs[:, :40])[1]
    assert set(places) == set(range(40))  # every place comes up


def test_selective_copying_may_fill_every_place():
    inputs, targets = tasks.selective_copying(1, n=5, tokens=5)
    assert (inputs[:, :5] == targets).all()


def test_induction_heads_ask_for_the_successor_of_the_special_token():
    inputs, targets = tasks.induction_heads(np.random.default_rng(0), batch=200, n=12, vocabulary=5)
    assert inputs.shape == (200, 12)
    assert targets.shape == (200,)
    assert (np.sum(inputs == 0, axis=1) == 2).all()
    assert (inputs[:, -1] == 0).all()
    first = np.argmax(inputs == 0, axis=1)
    assert (inputs[np.arange(200), first + 1] == targets).all()
    assert set(first) == set(range(10))
    assert set(np.unique(targets)) == {1, 2, 3, 4}


@pytest.mark.parametrize("task", [tasks.selective_copying, tasks.induction_heads])
def test_a_seed_stands_for_its_generator(task):
    for by_seed, drawn in zip(task(3, batch=2), task(np.random.default_rng(3), batch=2), strict=True):
        assert np.array_equal(by_seed, drawn)
    rng = np.random.default_rng(3)
    assert not np.array_equal(task(rng)[0], task(rng)[0])


@pytest.mark.parametrize(
    ("task", "options", "error", "words"),
    [
        (tasks.selective_copying, {"n": 3, "tokens": 4}, ValueError, "tokens is 4, expected at most n = 3"),
        (tasks.selective_copying, {"vocabulary": 2}, ValueError, "vocabulary is 2, expected at least 3"),
        (tasks.selective_copying, {"batch": 1.5}, TypeError, "batch"),
        (tasks.induction_heads, {"n": 2}, ValueError, "n is 2, expected at least 3"),
        (tasks.induction_heads, {"vocabulary": 1}, ValueError, "vocabulary is 1, expected at least 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(task, options, error, words):
    with pytest.raises(error, match=words):
        task(0, **options)


@pytest.mark.parametrize("rng", [None, 0.5, True, "0"])
@pytest.mark.parametrize("task", [tasks.selective_copying, tasks.induction_heads])
def test_what_is_no_generator_is_refused(task, rng):
    with pytest.raises(TypeError, match=r"expected a numpy\.random\.Generator or an integer seed"):
        task(rng)


def test_the_tutorial_shows_what_its_program_has_measured():
    tutorial = Path(__file__).parents[1] / "docs" / "tutorials" / "synthetic_tasks"
    text, facts = tutorial.with_suffix(".rst").read_text(), json.loads(tutorial.with_suffix(".json").read_text())
    for row in facts["results"]:
        cells = "".join(f"     - {x:.2f}\n" for x in row["accuracy"].values())
        assert f"   * - {row['task']}, {row['operator']}\n{cells}" in text
