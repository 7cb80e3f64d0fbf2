"""The wheel builds without a network, holds the package and nothing else, and imports."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pgn_peft

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_builds_and_imports(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "pgn_peft", source / "pgn_peft", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"pgn_peft-{pgn_peft.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pgn_peft"}
    assert "pgn_peft/py.typed" in names
    assert {name for name in names if name.startswith("pgn_peft/")} == {
        path.relative_to(source).as_posix() for path in (source / "pgn_peft").rglob("*") if path.is_file()
    }
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pgn_peft; print(pgn_peft.__file__, pgn_peft.PGNConfig())"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        encoding="utf-8",
    )
    assert outcome.stdout.startswith(str(tmp_path / "site"))


def test_text_files_are_read_and_written_in_one_encoding():
    """On Windows the default is another one."""
    for folder in ("pgn_peft", "examples", "benchmarks"):
        for path in ROOT.joinpath(folder).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", None) in ("read_text", "write_text"):
                    assert "encoding" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
