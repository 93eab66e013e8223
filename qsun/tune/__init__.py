"""Tune: a task's prefill module is trained through the frozen decode module."""
