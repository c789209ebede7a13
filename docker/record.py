"""Write an image's record, as the last step of docker/Dockerfile. It is reproducible byte for byte.

    python docker/record.py FILE BASE VARIANT REVISION SOURCE

SOURCE is the hash of the sources in the image's label, or `unknown`. It is an error if it differs
from the hash of the sources in the image.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from moa_dist.provenance import Image, code_hash, installed_packages


def main(file: str, base: str, variant: str, revision: str, source: str) -> None:
    """Check the hash of the sources, and write the record."""
    if source not in ("unknown", code_hash()):
        sys.exit(f"the sources in the image have the hash {code_hash()}, but the label is {source}")
    image = Image(base, variant, revision, platform.python_version(), installed_packages())
    Path(file).write_text(json.dumps(asdict(image), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
