"""What `pip install --editable` makes is found from everywhere, also next to a clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """\
import site
site.addsitedir({site!r})
import moa_dist
print(moa_dist.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages that holds what pip puts there."""
    folder = tmp_path_factory.mktemp("installed")
    build = f"from setuptools.build_meta import build_editable; build_editable({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.parametrize("name", ["moa_dist", "elsewhere"])
def test_a_script_next_to_a_clone_imports_the_package(installed, tmp_path, name):
    """The clone, a folder that is not a package, comes before it on the script's path."""
    (tmp_path / name).symlink_to(ROOT)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(site=str(installed)))
    # -S: without what else is installed in this environment.
    command = [sys.executable, "-S", str(script)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "moa_dist" / "__init__.py"
