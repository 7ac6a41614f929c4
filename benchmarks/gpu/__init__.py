"""What `benchmarks/gpu.sh` measures; each part is a program of its own, `python -m benchmarks.gpu.PART OUT [--small]`,
and writes what it has so far to OUT, as JSON, after everything that it measures."""
