"""A run directory: checkpoints with checksums, metrics, the report."""
