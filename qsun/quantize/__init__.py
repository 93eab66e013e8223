"""Quantize: from a base model to a low-bit decode module on disk."""
