"""Replicas of a worker behind nginx, for `bench_replicas.py` and the tests."""
