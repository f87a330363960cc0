"""Benchmarks: what custody costs, as ratios to a baseline in the same run (docs/performance.md)."""
