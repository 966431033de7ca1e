"""Addresses read from array objects are those that the array protocol tells."""

import numpy as np
import pytest

addresses = pytest.importorskip("subquad_numpy.runtime.addresses")


class Kind(np.ndarray):
    pass


@pytest.mark.parametrize(
    "x",
    [
        np.zeros(3),
        np.zeros((4, 5), np.float32)[1:, ::-1],
        np.zeros((0, 3)),
        np.zeros(()),
        np.zeros(7).view(Kind),
        np.frombuffer(b"12345678", np.uint8),
        np.zeros((3, 4), order="F").T[2],
    ],
)
def test_an_address_is_that_of_the_array_protocol(x: np.ndarray) -> None:
    expected = x.__array_interface__["data"][0]
    assert addresses.address_of(x) == addresses.read_address(x) == addresses.asked_address(x) == expected
