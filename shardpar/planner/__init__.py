"""Which plan: pure functions from a layer graph and a cluster to a plan, without jax."""
