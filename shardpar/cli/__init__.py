"""The `shardpar` command: one file per verb."""
