"""Estimates of the diagonal of the Hessian, for optimizers that divide by it."""
