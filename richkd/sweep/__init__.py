"""Many students from one cache: the grid, its cost, the engines and what they show."""

from richkd.sweep.run import run_sweep as run_sweep
