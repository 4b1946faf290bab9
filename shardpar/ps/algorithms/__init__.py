"""Algorithms over tables, a file and a paper each. Those with `TRAINS` are model files."""
