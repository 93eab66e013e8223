"""Other quantizers, each run in a process and an environment of its own."""
