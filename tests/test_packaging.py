"""What an sdist and an installed headrace contain."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = sorted(path.stem for path in (ROOT / "pyx").glob("*.pyx"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The names of the files in an sdist, without the leading directory."""
    # setuptools leaves an egg-info beside what it packs: not in the tree that others work in.
    work = tmp_path_factory.mktemp("sdist")
    tree = work / "tree"
    copy = ["cp", "-a", *(str(path) for path in ROOT.iterdir() if packed(path)), str(tree)]
    tree.mkdir()
    subprocess.run(copy, check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(work), str(tree)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as contents:
        return {member.name.partition("/")[2] for member in contents if member.isfile()}


def packed(path: Path) -> bool:
    return path.name not in {"build", "dist", ".git", ".venv"} and not path.name.startswith(".venv")


def test_sdist_has_every_source(sdist):
    wanted = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "Makefile",
        "setup.py",
        ".ci/setup",
        ".ci/run",
    }
    for folder, pattern in (
        ("pyx", "*.pyx"),
        ("pyx", "*.h"),
        ("python", "**/*.p[xy]*"),
        ("python", "**/py.typed"),
        ("docs", "*.md"),
    ):
        wanted |= {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern) if path.suffix != ".pyc"
        }
    assert {"pyx/_loop.pyx", "python/headrace/py.typed", "python/headrace/_pool.pxd"} <= wanted
    assert wanted - sdist == set()


def test_sdist_has_nothing_that_was_built(sdist):
    assert [name for name in sdist if re.search(r"\.(so|pyc|o)$|^pyx/.*\.c$|__pycache__|_build/", name)] == []


def test_every_cython_module_is_built_for_this_python():
    for name in COMPILED:
        module = importlib.import_module(f"headrace.{name}")
        assert Path(module.__file__ or "").suffix == ".so", name


def test_every_cython_module_has_its_stub():
    missing = [name for name in COMPILED if not (ROOT / "python/headrace" / f"{name}.pyi").exists()]
    assert missing == []


def test_the_version_is_the_installed_one():
    import headrace

    assert headrace.__version__ == importlib.metadata.version("headrace")


def test_the_base_install_needs_no_extra():
    """`import headrace` imports nothing that only an extra installs."""
    extras = {"rich", "hdrh", "psutil", "uvloop", "gssapi", "pytest", "hypothesis"}
    code = "import sys, headrace; print('\\n'.join({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert extras & set(loaded.split()) == set()
