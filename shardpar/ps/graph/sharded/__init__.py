"""Graph algorithms in JAX: edges are split over devices, what is known of nodes is on each."""
