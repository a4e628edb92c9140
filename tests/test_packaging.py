"""What is shipped and written down agrees with the tree; the Makefile finds a Python."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qwen35_mlx"
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LINKED = ("convert", "quant")
SOURCE_DIRS = ("qwen35_mlx", "convert", "quant", "tools", "tests", ".ci")
SOURCE_SUFFIXES = (".py", ".metal", ".cpp", ".h", ".md", ".toml", ".jinja", ".sh", "")
MAX_LINES = 500


def walk(top: Path, *, follow_links: bool = False) -> list[Path]:
    """Every file under `top` that belongs to the project, sorted."""
    files = []
    for folder, subfolders, names in os.walk(top, followlinks=follow_links):
        subfolders[:] = [s for s in subfolders if not s.startswith((".", "__pycache__"))]
        files += [Path(folder, name) for name in names if name != ".DS_Store"]
    return sorted(files)


def project_files() -> list[Path]:
    """The files of the source folders and the plain files at the root."""
    top = [ROOT / name for name in ("Makefile", "LICENSE", ".gitignore", "pyproject.toml")]
    inside = [file for name in SOURCE_DIRS for file in walk(ROOT / name)]
    return top + sorted(ROOT.glob("*.md")) + inside


def relative(files: list[Path]) -> list[str]:
    return [file.relative_to(ROOT).as_posix() for file in files]


def test_package_list_is_every_folder_with_python_in_it():
    folders = {f.parent for f in walk(PACKAGE, follow_links=True) if f.suffix == ".py"}
    in_tree = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == in_tree
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_package_dir_names_the_linked_folders():
    assert SETUPTOOLS["package-dir"] == {f"qwen35_mlx.{name}": name for name in LINKED}


@pytest.mark.parametrize("name", LINKED)
def test_link_is_a_link_with_a_relative_target(name):
    assert os.readlink(PACKAGE / name) == f"../{name}"


def test_package_data_covers_the_demo_and_the_kernels():
    patterns = [
        f"{package.replace('.', '/')}/{glob}"
        for package, globs in SETUPTOOLS["package-data"].items()
        for glob in globs
    ]
    data = [f for f in walk(PACKAGE) if f.suffix != ".py"]
    # fnmatch lets * cross a slash, setuptools does not.
    uncovered = [
        file
        for file in relative(data)
        if not any(fnmatch.fnmatch(file, p) and file.count("/") == p.count("/") for p in patterns)
    ]
    assert uncovered == []


def tree() -> list[str]:
    """The paths in the tree of AGENTS.md, one a line, nested by two spaces."""
    section = (ROOT / "AGENTS.md").read_text(encoding="utf-8").split("\n## The tree\n")[1]
    paths, parents = [], []
    for line in section.split("```")[1].splitlines()[1:]:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        if not name.endswith("/"):
            paths.append("".join(parents))
    return paths


def test_the_tree_names_every_module_and_no_other():
    packages = ("qwen35_mlx", *LINKED)
    modules = [f for name in packages for f in walk(ROOT / name) if f.suffix == ".py"]
    in_tree = {file for file in relative(modules) if not file.endswith("__init__.py")}
    named = [path for path in tree() if path.startswith(tuple(f"{p}/" for p in packages))]
    assert len(named) == len(set(named))
    assert {path for path in named if re.search(r"(?<!__init__)\.py$", path)} == in_tree


def test_no_source_file_is_longer_than_500_lines():
    sources = [
        file
        for file in project_files()
        if file.suffix in SOURCE_SUFFIXES
        and file.relative_to(ROOT).parts[1:2] != ("demo",)
        # A log only grows.
        and file.name != "LOG.md"
    ]
    lengths = {file: len(file.read_bytes().splitlines()) for file in sources}
    assert {f.name: n for f, n in lengths.items() if n > MAX_LINES} == {}


def test_no_file_carries_an_absolute_path_of_some_machine():
    path = re.compile(rb"(?<![\w.~])/(?:work|root|home)" + rb"/")
    assert relative([f for f in project_files() if path.search(f.read_bytes())]) == []


# A Python of a given version: judges -c like that version, makes a venv that holds itself,
# and notes every call.
FAKE_PYTHON = """#!/bin/sh
echo "{name} $*" >> "{log}"
case "$*" in
  -c*) exec "{real}" -c 'import sys; sys.version_info = ({numbers}); exec(sys.argv[1])' "$2" ;;
  --version) echo "Python {version}" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


class FakeMachine:
    """A folder with our Makefile, and a PATH that holds the fake Pythons and few tools."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "fake bin"
        self.log = folder / "calls.log"
        self.bin.mkdir()
        for tool in ("mkdir", "cp", "rm", "touch"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)

    def add_python(self, name: str, version: str) -> None:
        script = FAKE_PYTHON.format(
            name=name,
            log=self.log,
            real=sys.executable,
            version=version,
            numbers=version.replace(".", ", "),
        )
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def make(self, target: str) -> subprocess.CompletedProcess:
        make = shutil.which("make")
        if make is None:
            pytest.skip("no make")
        return subprocess.run(
            [make, target],
            cwd=self.folder,
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
        )

    def calls(self, what: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if what in line]


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"python3": "3.11.0"}, "python3"),
        ({"python3": "3.14.1"}, "python3"),
        ({"python3": "3.9.6", "python3.12": "3.12.4"}, "python3.12"),
        ({"python3": "3.13.0", "python3.11": "3.11.9", "python3.13": "3.13.0"}, "python3.13"),
        # a shim that carries the name of a version it does not have
        ({"python3.13": "3.10.2", "python3.11": "3.11.9"}, "python3.11"),
    ],
)
def test_make_takes_the_first_python_that_is_new_enough(tmp_path, versions, chosen):
    machine = FakeMachine(tmp_path)
    for name, version in versions.items():
        machine.add_python(name, version)
    result = machine.make(".venv/bin/python")
    assert result.returncode == 0, result.stderr
    assert machine.calls("-m venv") == [f"{chosen} -m venv --clear .venv"]


@pytest.mark.parametrize("version", ["3.9.6", "3.10.14", "2.7.18"])
def test_make_refuses_an_old_python_and_says_why(tmp_path, version):
    machine = FakeMachine(tmp_path)
    machine.add_python("python3", version)
    result = machine.make("test")
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert f"got: Python {version}" in result.stderr
    assert machine.calls("-m venv") == []


def test_make_installs_once_and_again_when_pyproject_changes(tmp_path):
    machine = FakeMachine(tmp_path)
    machine.add_python("python3", "3.12.0")
    for _ in range(2):
        assert machine.make("test").returncode == 0
    assert len(machine.calls("-m venv")) == 1
    assert len(machine.calls("-e .[test]")) == 1
    assert len(machine.calls("-m pytest")) == 2
    os.utime(tmp_path / ".venv" / ".installed-test", (0, 0))
    assert machine.make("test").returncode == 0
    assert len(machine.calls("-e .[test]")) == 2
