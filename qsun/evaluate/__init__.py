"""Evaluation: accuracy of two modules, compared fairly."""
