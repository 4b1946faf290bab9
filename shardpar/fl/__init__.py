"""Federated and privacy-preserving learning: parties that may not share data train together."""
