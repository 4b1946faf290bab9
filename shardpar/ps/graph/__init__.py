"""Graph algorithms over edge lists, on one host or over many devices."""
