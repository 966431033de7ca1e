"""Format of the numbers in tables."""


def three_digits(x: float) -> str:
    """`x` as text with 2, 1 or 0 decimals, so that numbers from 1 on have three digits or more; never an exponent."""
    decimals = 2 if x < 10 else 1 if x < 100 else 0
    return f"{x:.{decimals}f}"
