"""Federated algorithms, a file and a paper each: the same objects in simulation and deployment."""
