"""A plan becomes XLA programs."""
