"""Commands that look at caches and runs, check them, or move them: one a file."""
