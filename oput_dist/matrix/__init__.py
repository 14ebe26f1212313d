"""Work on whole matrices: pure functions of stacks of them. Knows nothing of parameters, ranks or optimizers."""
