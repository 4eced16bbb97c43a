"""Reproducible side-by-side measurements; results with device, versions and date under `benchmarks/results/`."""
