"""Tables as text."""


def aligned(head: list[str], rows: list[list[str]]) -> str:
    """Right-aligned columns under a head and a rule."""
    cells = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def milliseconds(seconds: float) -> str:
    """Three digits or so, in ms."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.4f}"


def megabytes(count: float) -> str:
    """In 10^6 bytes."""
    return f"{count / 1e6:,.1f}"
