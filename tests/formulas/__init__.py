"""Update rules written out in plain PyTorch, from papers and OPTIMIZERS.md: oracles where no library is right."""
