"""Benchmarks: ours, TRL's on the same work, and profiles."""
