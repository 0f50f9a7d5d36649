"""Train a student: device, data, loop, targets, and the run folder."""
