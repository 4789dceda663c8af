"""Parts of `scripts/bench_hosts.py`: machines in namespaces, and what is measured on them."""
