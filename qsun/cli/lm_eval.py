"""`qsun-lm-eval`: lm-eval's own command, which then knows the models `qsun` and `qsun-served`."""

from __future__ import annotations

import sys

from qsun.errors import QsunError


def main() -> None:
    """Run lm-eval's command. A user's mistake ends as its message."""
    from lm_eval.__main__ import cli_evaluate

    from qsun.evaluate.registry import register_models

    register_models()
    try:
        cli_evaluate()
    except QsunError as error:
        sys.stderr.write(f"qsun-lm-eval: {error}\n")
        sys.exit(error.exit_code)
