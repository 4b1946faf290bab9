"""Federated learning between processes: certificates, links over gRPC, rounds that survive."""
