"""Tables for a terminal, and in Markdown."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], alignment: str) -> str:
    """Lines of cells in columns as wide as their widest cell, two spaces apart.

    Args:
      lines: the cells, as many in each line as there are columns.
      alignment: `<` (left) or `>` (right) for each column.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    columns = list(zip(alignment, widths, strict=True))
    return "\n".join(
        "  ".join(
            f"{cell:{side}{w}}" for cell, (side, w) in zip(line, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown_table(lines: Sequence[Sequence[str]], alignment: str) -> str:
    """The same lines as a Markdown table; the first is its header.

    Args:
      lines: the cells, as many in each line as there are columns.
      alignment: `<` (left) or `>` (right) for each column.
    """
    rule = ["---:" if side == ">" else "---" for side in alignment]
    header, *body = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *body))
