"""Vertical learning: two parties know different columns of the same rows, and train on both.

The guest has the labels and perhaps columns, the host has columns. `linear` trains logistic and
linear regression whose weights neither party ever sees; `guest` and `host` grow boosted trees.
Rows must be aligned first: `shardpar.fl.psi`.
"""
