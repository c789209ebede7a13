"""What `moa-dist prepare` takes: `python -m tests.benchmarks.prepare --gigabytes 4`.

Makes one file of that size, of random words or of `--text FILE` again and again, and prepares it
with a tokenizer trained on its beginning: as one document, as a document per line, and in parts
that are joined. Prints MB/s per core (by processor time, not by the clock) and the peak of the
memory of each process; exits with 1 if that exceeds 1 GiB. Needs about three times the size of the
file in `--folder`.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1 << 30
BLOCK_BYTES = 1 << 24
LETTERS = "etaoinshrdlu"


def random_text(size: int, length: int) -> str:
    """Make lines of words of about `length` letters, of which some come often."""
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 2 * length))) for _ in range(2000)]
    lines, done = [], 0
    while done < size:
        line = " ".join(words[int(2000 * rng.random() ** 3)] for _ in range(rng.randint(1, 30)))
        lines.append(line)
        done += len(line) + 1
    return "\n".join(lines)


def write_text(file: Path, block: bytes, size: int) -> None:
    """Write a file of `size` bytes that repeats a block."""
    with file.open("wb") as out:
        while size > 0:
            out.write(block[:size] if size < len(block) else block)
            size -= len(block)


def run(what: str, num_bytes: int, *arguments: object) -> bool:
    """Run the command, and print its speed and memory; return whether it stays in the limit."""
    command = [sys.executable, "-m", "moa_dist.cli.main", "prepare", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{what}: exit status {os.waitstatus_to_exitcode(status)}")
    seconds = used.ru_utime + used.ru_stime
    peak = used.ru_maxrss * 1024
    print(
        f"{what}: {num_bytes / 1e6 / seconds:.2f} MB/s per core ({seconds:.0f} s), "
        f"at most {peak / 2**20:.0f} MiB",
        flush=True,
    )
    return peak <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--text", type=Path, help="text to repeat instead of random words")
    parser.add_argument("--word-length", type=int, default=5, help="of random words")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--only", choices=["file", "line", "parts"])
    args = parser.parse_args()
    size = int(args.gigabytes * 1e9)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.text:
            with args.text.open("rb") as stream:
                block = stream.read(BLOCK_BYTES)
        else:
            block = random_text(BLOCK_BYTES, args.word_length).encode()
        (folder / "sample.txt").write_bytes(block[: 1 << 20])
        write_text(folder / "text.txt", block, size)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sample = ("--input", folder / "sample.txt", "--output", folder / "tokenizer")
        run("sample, with training", 1 << 20, *sample)
        common = ("--input", folder / "text.txt", "--tokenizer", folder / "tokenizer")
        fits = True
        for rule in ("file", "line"):
            if args.only in (None, rule):
                output = folder / rule
                fits &= run(f"by {rule}", size, *common, "--documents", rule, "--output", output)
                shutil.rmtree(output)
        if args.only in (None, "parts"):
            by_line = (*common, "--documents", "line", "--output", folder / "out")
            for number in range(1, args.parts + 1):
                part = f"{number}/{args.parts}"
                fits &= run(f"part {part}", size // args.parts, *by_line, "--part", part)
            join = ("--join", folder / "out.parts", "--output", folder / "out")
            fits &= run("join", size, *join)
    finally:
        shutil.rmtree(folder)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
