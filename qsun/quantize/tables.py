"""Tables that are Markdown and read well as plain text, and numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "not known"


def percent(value: float, digits: int = 0) -> str:
    """A share in percent."""
    return f"{100 * value:.{digits}f} %"


def error_text(value: float) -> str:
    """A relative error in percent."""
    return percent(value, 2)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also stand beneath each other as plain text, numbers to the right."""

    def is_number(cell: str) -> bool:
        return cell[:1].isdigit() or cell.startswith("x ") or cell == UNKNOWN

    widths = [max(3, *(len(row[at]) for row in [header, *rows])) for at in range(len(header))]
    right = [at > 0 and all(is_number(row[at]) for row in rows) for at in range(len(header))]
    lines = [
        "-" * (width - 1) + ":" if one else "-" * width
        for width, one in zip(widths, right, strict=True)
    ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if one else cell.ljust(width)
            for cell, width, one in zip(row, widths, right, strict=True)
        )
        + " |"
        for row in [header, lines, *rows]
    )
