"""The benchmarks of `scripts/benchmark.py`, a module each: `arguments(parser)` and `run(options)`, which prints its
tables and returns its figures, fit for JSON."""
