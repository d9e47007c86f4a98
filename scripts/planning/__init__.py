"""What a load costs and how many workers it takes: `python scripts/plan.py --help`.

Speeds are measured ones (docs/benchmarks) or the user's; prices are a table that people edit. Nothing is estimated
from a GPU's name. What cannot be known here is an assumption, and every assumption is printed.

    prices.py      kinds of workers and what they cost      speeds.py    characters per second, from benchmark files
    arrivals.py    when jobs come and how long they are     kernel.py    the simulation's loop, compiled by numba
    simulation.py  a fleet under a load: waiting and cost   sizing.py    the fewest workers that are enough
    report.py      table and JSON                           plot.py      workers and queue over time
"""
