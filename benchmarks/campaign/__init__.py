"""A campaign against failure: faults of every kind, each a file, counted in docs/results/reliability.md.

python benchmarks/campaign/run.py [--part 0.1] [NAME ...]
"""
