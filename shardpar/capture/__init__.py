"""A Flax model becomes a layer graph, without a device and without allocating a parameter."""
