"""Numbers in tables."""


def three_digits(x: float) -> str:
    """At least two and mostly three significant digits, never an exponent."""
    decimals = 2 if x < 10 else 1 if x < 100 else 0
    return f"{x:.{decimals}f}"
