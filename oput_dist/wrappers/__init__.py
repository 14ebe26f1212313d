"""Optimizers around other optimizers. Know nothing of layouts or ranks; not of particular optimizers either."""
