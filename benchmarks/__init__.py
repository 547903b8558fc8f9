"""Benchmarks against floors and peers: `python -m benchmarks` writes figures/bench/."""
