"""Errors of clustered attention on the sample: against n beside a window, and against the number of opened clusters."""

import matplotlib.pyplot as plt
from sample import load
from seen import COLOURS, show_errors

import subquad
from subquad.cli.definitions import relative_error

OPENED = (0, 1, 2, 4, 8, 16, 32)

figure, (errors, by_opened) = plt.subplots(1, 2, figsize=(7.5, 2.4), layout="constrained")
show_errors(
    errors,
    {
        "clustered, 4 opened": lambda n: subquad.Clustered(opened=4, chunk=64),
        "clustered, 16 opened": lambda n: subquad.Clustered(opened=16, chunk=64),
        "window of 128 keys": lambda n: subquad.Window(left=127),
    },
)
q, k, v = load(1024)
for causal, colour in ((False, COLOURS[0]), (True, COLOURS[1])):
    exact = subquad.attention(q, k, v, "exact", causal=causal)
    methods = [subquad.Clustered(opened=opened, chunk=64) for opened in OPENED]
    found = [relative_error(subquad.attention(q, k, v, x, causal=causal), exact) for x in methods]
    label = "causal" if causal else "all keys"
    by_opened.plot(range(len(OPENED)), found, "o-", color=colour, markersize=3.5, label=label)
by_opened.set(yscale="log", xlabel="opened", title="error, n = 1024")
by_opened.set_xticks(range(len(OPENED)), [str(p) for p in OPENED])
by_opened.minorticks_off()
by_opened.legend(fontsize=7)
