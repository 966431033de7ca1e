"""One step of a Mamba block, compiled as a whole: its threads meet four times, and no array is made in between."""
