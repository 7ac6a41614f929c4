"""Measurements: `python -m benchmarks.NAME` writes benchmarks/results/NAME.json, which fills tables in the docs."""
