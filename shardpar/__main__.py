"""`python -m shardpar` is the `shardpar` command."""

from shardpar.cli.main import run

run()
