"""Measuring a finished model: held-out loss, tasks, talking to it."""
