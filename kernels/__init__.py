"""Rules, stages and Triton kernels: the lowest floor, imported as ``oput_dist.kernels``. Knows tensors only."""
