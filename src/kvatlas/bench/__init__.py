"""Benchmarks that stand our kernels and our engine beside the best others, in one run on one machine.

Each form takes its turn in every round, so that a busy machine hurts all alike; medians are reported, wall and CPU
seconds apart, against the machine's own limits measured in the same rounds.
"""
