"""Tests of federated algorithms."""
