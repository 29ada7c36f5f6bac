"""Plain PyTorch versions of the losses, written to be read: the oracle of the tests, the baseline of the benchmarks."""
