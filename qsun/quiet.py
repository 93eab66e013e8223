"""Quiet: libraries' own log lines, warnings and bars give way to qsun's.

Each variable can be set beforehand to hear that library again.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

VARIABLES = {
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LLM_COMPRESSOR_LOG_DISABLED": "true",
    "COMPRESSED_TENSORS_LOG_DISABLED": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quiet_libraries() -> None:
    """Set the variables that libraries read as they are imported; call before importing any."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=SyntaxWarning)


@contextmanager
def hushed() -> Iterator[None]:
    """Drop what llm-compressor draws on stderr with no switch against it; errors still raise."""
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    with redirect_stderr(io.StringIO()):
        yield
