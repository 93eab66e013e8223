"""Verify: proof that what is served is what was made."""
