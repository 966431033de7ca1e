"""NumPy backend: arrays that are computed at once and may be filled in place."""

IN_PLACE = True
