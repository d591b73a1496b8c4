"""Recovered gain over directions, tasks, methods and random seeds: `python -m benchmarks.quality --help`."""
