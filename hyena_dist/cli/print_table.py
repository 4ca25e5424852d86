"""Wide tables, on a terminal and in a file."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

LEAST = 120
"""Characters of a line in a file, which has no width of its own."""
MOST = 10_000


def print_table(table: Table) -> None:
    """Print a table. Where it does not go to a terminal every row keeps to one line, however long that is."""
    console = Console()
    if not console.is_terminal:
        console.width = max(LEAST, Measurement.get(console, console.options.update(width=MOST), table).maximum)
    console.print(table)
