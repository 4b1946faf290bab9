"""What is where: clusters, layouts, graphs and plans as plain Python values, without jax."""
