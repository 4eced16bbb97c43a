"""Experiments: measurements that no command of the package needs. Results lie in `results/`, with date, CPU and versions."""
