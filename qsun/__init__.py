"""qsun: one low-bit decoder that serves many fine-tuned LLMs."""

__version__ = "0.1.0"
