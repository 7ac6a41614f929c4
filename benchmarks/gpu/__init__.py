"""The parts of `benchmarks/gpu.sh`; each is a separate program, `python -m benchmarks.gpu.PART OUT [--small]`, which
rewrites OUT with its results so far, as JSON, after each measurement."""
