"""Sparse models and graphs whose parameters outgrow one device."""
