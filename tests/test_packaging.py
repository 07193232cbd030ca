"""What a user gets from a clone, from a zip download, from a wheel and from PYTHONPATH."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("ring_sp", "integrations", "examples", "tests")
WHERE = "import ring_sp.integrations as found; print(found.__file__)"


def _copy(to: Path) -> Path:
    """What the repository holds, with the symlink as it is."""
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in PARTS:
        shutil.copytree(ROOT / part, to / part, symlinks=True, ignore=junk)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, to)
    return to


@pytest.fixture(scope="module", params=["clone", "zip"])
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository; a zip download has a text file where a clone has the symlink."""
    copy = _copy(tmp_path_factory.mktemp(request.param))
    link = copy / "ring_sp" / "integrations"
    assert link.readlink() == Path("../integrations")
    if request.param == "zip":
        link.unlink()
        link.write_text("../integrations")
    return copy


def _python(*args: str | Path, cwd: Path, at: Path | None = None, path: Path | None = None) -> str:
    """What a Python prints that sees no other PYTHONPATH than `path`."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [at or sys.executable, *args],
        cwd=cwd,
        env=env | ({"PYTHONPATH": str(path)} if path else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _pip(*args: str | Path, cwd: Path, at: Path | None = None) -> None:
    """Run an offline pip command that builds with what is installed."""
    _python("-m", "pip", "-q", *args, "--no-deps", "--no-index", cwd=cwd, at=at)


def test_a_wheel_holds_all_modules_under_one_name(checkout: Path, tmp_path: Path) -> None:
    _pip("wheel", "--no-build-isolation", "--wheel-dir", tmp_path, checkout, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    (entries,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert b"ring-sp = ring_sp.cli:main" in ZipFile(wheel).read(entries)
    core = {path.relative_to(checkout) for path in checkout.glob("ring_sp/**/*.py")}
    hosts = {
        "ring_sp" / path.relative_to(checkout) for path in checkout.glob("integrations/**/*.py")
    }
    assert held == {path.as_posix() for path in core | hosts} | {"ring_sp/py.typed"}

    target = tmp_path / "target"
    _pip("install", "--target", target, wheel, cwd=tmp_path)
    found = _python("-c", WHERE, cwd=tmp_path, path=target)
    assert found == str(target / "ring_sp" / "integrations" / "__init__.py")


def test_an_editable_install_leads_to_the_checkout(checkout: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    # pip must not uninstall a ring_sp that it sees among the dependencies.
    options = ("--no-build-isolation", "--ignore-installed")
    _pip("install", *options, "--editable", checkout, cwd=tmp_path, at=python)
    found = Path(_python("-c", WHERE, cwd=tmp_path, at=python))
    assert found.resolve() == checkout.resolve() / "integrations" / "__init__.py"


def test_pythonpath_finds_the_integrations(tmp_path: Path) -> None:
    copy = _copy(tmp_path / "copy")
    for cwd, path in ((tmp_path, copy), (copy, None)):
        found = Path(_python("-c", WHERE, cwd=cwd, path=path))
        assert found.resolve() == copy.resolve() / "integrations" / "__init__.py"
