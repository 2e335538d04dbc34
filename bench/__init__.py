"""Benchmarks: interleaved rounds against other loops and against plain C; see docs/benchmarks.md."""
