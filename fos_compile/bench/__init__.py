"""Measurements that a user runs: `python -m fos_compile bench`."""
