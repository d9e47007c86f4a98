"""Measures this engine against upstream's own code, or against itself: `python scripts/benchmark.py --help`.

Both sides get the same random full-size weights, say the same number of tokens, and take turns in one
run, so that a busy moment of the machine meets both. The result is a median with its spread and a ratio,
never a pass or a failure: a benchmark is not a test. Random weights say nothing about audio quality.

    options.py    what was asked for, and who takes part: ours in several settings, or upstream
    figures.py    taking turns, medians, ratios
    targets.py    the figures to reach
    weights.py    checkpoints, written once to a cache folder
    upstream.py   upstream's classes, quiet, with ready-made conditionals
    decoding.py   row t3             rendering.py  rows flow, vocoder
    speaking.py   rows utterance, long-form, throughput, speak
    voices.py     row voice          starting.py   rows cold-start, memory (child.py is the process they start)
    rows.py       all rows by name   report.py     table and JSON       plot.py  curves against rows
"""
