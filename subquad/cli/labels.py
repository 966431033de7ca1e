"""Labels beside the marks of a scatter plot, each on the side where it covers least."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

FONT_SIZE = 8.5  # points
MARK = 4.5  # half the width of a mark with its edge, points
BEAD = 2.0  # points
LETTER = (0.62, 1.2)  # width and height of a letter, in font sizes


Segment = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        """Area."""
        return (self.right - self.left) * (self.top - self.bottom)


@dataclass(frozen=True)
class Mark:
    """A mark at data coordinates and what to write beside it."""

    x: float
    y: float
    text: str
    color: str


def place(axes: Axes, marks: Sequence[Mark], segments: Sequence[Segment] = ()) -> None:
    """Write the text of each mark on that side (right, left, above, below) where it covers least.

    `segments` are lines, in data coordinates, better not written upon. The limits and the place of `axes` must be
    final.
    """
    per_point = axes.figure.dpi / 72
    centres = [axes.transData.transform((mark.x, mark.y)) / per_point for mark in marks]
    taken = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in centres]
    corners = axes.transAxes.transform([(0, 0), (1, 1)]) / per_point
    frame = Box(*corners[0], *corners[1])
    for segment in segments:
        taken += _beads(*(axes.transData.transform(end) / per_point for end in segment))
    for mark, (x, y) in zip(marks, centres, strict=True):
        width, height = LETTER[0] * FONT_SIZE * len(mark.text), LETTER[1] * FONT_SIZE
        away_x, away_y = MARK + 2 + width / 2, MARK + height / 2
        sides = [(away_x, 0.0), (-away_x, 0.0), (0.0, away_y), (0.0, -away_y)]
        sides += [(right * away_x, up * height) for up in (0.6, -0.6) for right in (1, -1)]
        boxes = {side: _around(x + side[0], y + side[1], width, height) for side in sides}

        def covered(side: tuple[float, float], boxes: dict[tuple[float, float], Box] = boxes) -> float:
            box = boxes[side]
            return sum(box.overlap(other) for other in taken) + 4 * (box.area - box.overlap(frame))

        best = min(sides, key=covered)
        taken.append(boxes[best])
        axes.annotate(
            mark.text,
            (mark.x, mark.y),
            xytext=best,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=FONT_SIZE,
            color=mark.color,
        )


def _beads(start: np.ndarray, end: np.ndarray) -> list[Box]:
    """A line as a string of small boxes."""
    count = 1 + int(np.hypot(*(end - start)) / BEAD)
    centres = np.linspace(start, end, count + 1)
    return [_around(x, y, BEAD, BEAD) for x, y in centres]


def _around(x: float, y: float, width: float, height: float) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
