"""The notebooks run from top to bottom on their stand-ins, and keep the outputs of a run on real images."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")

NOTEBOOKS = Path(__file__).parents[1] / "examples/notebooks"


def read_cells(name):
    return json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name):
        names = {}
        for cell in read_cells(name):
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        mpl.pyplot.close("all")
        return names

    return run


@pytest.mark.slow
def test_a_folder(run):
    names = run("fine_tune_on_a_folder.ipynb")
    assert names["test_accuracy"] == 1
    assert names["answer"][0]["label"] == names["names"][names["test"][0]["label"]]


@pytest.mark.slow
def test_a_black_box(run):
    names = run("black_box_by_calls_alone.ipynb")
    assert names["accuracy"] == {"a head alone": 1, "by calls alone": 1}
    assert names["best"]["label"] == names["names"][names["test"][0]["label"]]


@pytest.mark.slow
def test_clip(run):
    names = run("clip_and_class_names.ipynb")
    assert names["prompted"] == 1 > names["zero_shot"]
    assert names["answer"][0]["label"] == names["names"][names["test"][0]["label"]]


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_outputs_are_of_one_run_of_the_whole(file):
    cells = [cell for cell in read_cells(file.name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "stream" in kinds
    assert "error" not in kinds
    assert file.stat().st_size < 400_000
    assert "/home/" not in file.read_text(encoding="utf-8")
