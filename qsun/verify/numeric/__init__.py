"""The numeric level: K, V and predictions beside those of full precision."""
