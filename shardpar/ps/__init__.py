"""Sparse models and graphs whose parameters outgrow one device, over the same layouts."""
