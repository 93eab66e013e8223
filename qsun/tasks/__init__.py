"""Tasks: what a prefill module is tuned for, and how its answers are judged."""
