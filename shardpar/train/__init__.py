"""Dense training: data, optimizer, state, the loop."""
