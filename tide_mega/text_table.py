"""Tables in plain text."""

from collections.abc import Collection, Sequence


def aligned(
    heads: Sequence[Sequence[str]],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 0,
    ruled: Collection[int] = (),
) -> str:
    """Return columns two spaces apart: header lines, a rule, and the rows.

    Args:
        heads: header lines, of as many cells as the rows.
        rows: cells by row.
        left: how many of the first columns are aligned to the left; the others are to the right.
        ruled: numbers of rows, from 0, that have a rule above them.
    """
    widths = [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [text for number, row in enumerate(rows) for text in ([rule] * (number in ruled) + [line(row)])]
    return "\n".join([*map(line, heads), rule, *body])
