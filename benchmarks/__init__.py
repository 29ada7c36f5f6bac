"""What the loss costs and what it gains: one module a question, each run as ``python -m benchmarks.<name>``."""
