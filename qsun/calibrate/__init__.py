"""Calibrate: the text that a quantization sees, read, tokenized, counted and digested."""
