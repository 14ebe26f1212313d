"""What steps cost, and whether every GPU path is right: ``python -m benchmarks.step`` and ``benchmarks.gpu``."""
