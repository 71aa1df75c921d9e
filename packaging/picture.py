"""A terminal's output with its colours, on stdin → an SVG on stdout."""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 96


def main() -> None:
    """Draw it as a terminal of COLUMNS columns."""
    text = sys.stdin.read().replace("\r\n", "\n").rstrip("\n")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in text.split("\n"):
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="lfsvc", theme=MONOKAI, unique_id="lfsvc")
    # A picture must not fetch fonts from anywhere: the reader's own monospace does.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    sys.stdout.write(svg.replace("Fira Code", "DejaVu Sans Mono, Menlo, Consolas"))


if __name__ == "__main__":
    main()
