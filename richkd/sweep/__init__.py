"""Sweeps: a grid of runs from one cache, its cost, the engines that train it, and the board."""

from richkd.sweep.run import run_sweep as run_sweep
