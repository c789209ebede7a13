import random
import shutil
from pathlib import Path

import pytest

from tests.integration.test_commands import run

NUM_DOCUMENTS, WORDS_EACH = 40, 500


def write_text(folder: Path) -> None:
    """Documents of words at random, alike on average, and the same in every session."""
    choice = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(choice.choices(letters, k=choice.randint(2, 7))) for _ in range(300)]
    folder.mkdir()
    for document in range(NUM_DOCUMENTS):
        text = " ".join(choice.choices(words, k=WORDS_EACH))
        (folder / f"{document:02d}.txt").write_text(text)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder that holds `text`, which the command has prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    write_text(folder / "documents")
    run(
        "moa-dist", "prepare", "--input", "documents", "--output", "text",
        "--valid-share", "0.1", "--vocab-size", "300", "--sequence-length", "32",
        cwd=folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def job(request, prepared, tmp_path_factory) -> Path:
    """A folder with prepared text and the module's `CONFIG` as `tiny.yaml`."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(prepared / "text", folder / "text")
    (folder / "tiny.yaml").write_text(request.module.CONFIG)
    return folder
