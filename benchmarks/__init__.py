"""What the optimizers cost, and whether every GPU path is right: ``python -m benchmarks.step``, ``python -m benchmarks.gpu``."""
