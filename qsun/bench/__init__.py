"""Load on a served bundle: what comes out of it, how fast, and for whom."""
