"""`moa-dist report`: writes one HTML page about runs; `moa_dist.report` makes it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moa_dist.cli.output import not_written
from moa_dist.report.page import page
from moa_dist.report.read import read_run
from moa_dist.units import short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run; several are compared"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="page to write (report.html in RUN, or comparison.html in the first of several)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print where; returns the exit status."""
    runs = [read_run(folder) for folder in args.runs]
    name = "report.html" if len(runs) == 1 else "comparison.html"
    output: Path = args.output or args.runs[0] / name
    # File names may contain bytes that are not text.
    content = page(runs, time.time()).encode("utf-8", errors="replace")
    try:
        output.write_bytes(content)
    except OSError as error:
        raise not_written(output, error) from error
    print(f"{output}: {short(len(content))}B; open it in a browser")
    return 0
