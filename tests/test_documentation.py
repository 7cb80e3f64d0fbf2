"""What the documentation says: its code runs, its commands exist, its links lead somewhere, its figures have rows."""

import base64
import dataclasses
import functools
import inspect
import io
import json
import re
import runpy
import statistics
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import report
import torch
import transformers
import yaml
from bench import Results
from conftest import tiny_vit
from peft import get_peft_model
from PIL import Image
from tiny_clip import tokenizer, two_towers
from transformers import ViTImageProcessor

import pgn_peft
from pgn_peft import Classifier, PGNConfig
from pgn_peft.training import ladder
from pgn_peft.tuner.config import own_fields

ROOT = Path(__file__).parents[1]
GUIDES = sorted(str(path.relative_to(ROOT)) for path in ROOT.joinpath("docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md", *GUIDES]


# checkpoint -> the folder with a tiny model in its place
STAND_INS = {
    "google/vit-base-patch16-224": "vit",
    "openai/clip-vit-base-patch32": "clip",
    "openai/clip-vit-base-patch16": "two-towers",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def answer_with_embeddings(request, timeout):
    """Answer images in OpenAI's format, as an embedding server does, in another order than they came in."""
    images = json.loads(request.data)["input"]
    assert all(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size == (32, 32) for image in images)
    embeddings = torch.randn(len(images), 512).tolist()
    data = [{"index": index, "embedding": embedding} for index, embedding in enumerate(embeddings)]
    return io.BytesIO(json.dumps({"data": data[::-1]}).encode())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a page's code top to bottom in one session, with tiny stand-ins for the checkpoint, images and training."""
    tiny_vit(num_labels=1000).save_pretrained(tmp_path / "vit")
    tiny_vit("CLIPVisionModelWithProjection", projection_dim=512).save_pretrained(tmp_path / "clip")
    two_towers().save_pretrained(tmp_path / "two-towers")
    tokenizer().save_pretrained(tmp_path / "two-towers")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 3} for n in range(6)]
    monkeypatch.setattr(transformers.TrainingArguments, "num_train_epochs", 1)
    for name in ("EPOCHS", "FEWEST_STEPS", "SHORTEST"):
        monkeypatch.setattr(ladder, name, 1)
    monkeypatch.setattr(urllib.request, "urlopen", answer_with_embeddings)
    server = transformers.pipeline("image-classification", model="vit")
    adapted = get_peft_model(tiny_vit(num_labels=1000).from_pretrained("vit"), PGNConfig(num_labels=3))
    Classifier(adapted, ViTImageProcessor.from_pretrained("vit")).save_pretrained("outputs/my-adapter")

    def run(page):
        names = {"train_dataset": rows, "image": Image.new("RGB", (40, 30), "red"), "server": server}
        names |= {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        batch = {"pixel_values": names["pixel_values"], "labels": torch.tensor([row["labels"] for row in rows])}
        names |= {"train_batches": [batch], "eval_batches": [batch]}
        names |= {"train_images": [Image.new("RGB", (40, 30), (40 * n, 99, 0)) for n in range(6)]}
        names |= {"labels": torch.tensor([row["labels"] for row in rows]), "text_embeds": torch.eye(3, 512)}
        names |= {"validation": rows, "make_model": lambda: tiny_vit(num_labels=1000)}
        code = "\n".join(blocks(page, "python"))
        for checkpoint, stand_in in STAND_INS.items():
            code = code.replace(checkpoint, stand_in)
        exec(code, names)
        return names

    return run


# What a guide's code leaves: the shapes and files that its comments name.
OUTCOMES = {
    "docs/backbones.md": lambda names: (
        names["model"](pixel_values=names["pixel_values"], labels=names["labels"]).logits.shape == (6, 3)
    ),
    "docs/config.md": lambda names: True,  # configs, which check themselves
    "docs/how-it-works.md": lambda names: (
        [tuple(names[name].shape) for name in ("coefficients", "mixed", "attention")]
        == [(2, 4, 10), (2, 4, 48), (2, 2, 4)]
    ),
    "docs/index.md": lambda names: (
        {entry["label"] for entry in names["classify"](names["image"])} == {f"LABEL_{index}" for index in range(3)}
    ),
    "docs/share.md": lambda names: (
        names["logits"].shape == (3, 2)
        and names["classifier"].model.config.id2label[2] == "owl"
        and Path("model.onnx").stat().st_size > 1000
    ),
    "docs/train.md": lambda names: (
        names["trainer"].state.epoch == names["trainer"].args.num_train_epochs
        and {group["lr"] for group in names["groups"]} == {1e-3, 3e-3}
        and 0 <= names["probe"].linear <= 1
        and names["logits"].shape == (6, 3)
        and len(names["ladder"].results) == 6
        and 0 <= names["ladder"].chosen.accuracy <= 1
    ),
}


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python") and page != "docs/deploy.md"])
def test_the_guides_code_runs(page, run):
    assert OUTCOMES[page](run(page))


def test_the_readmes_code_runs(run):
    source = "\n".join(blocks("README.md", "python"))
    assert "get_peft_model" in source
    assert "load_classifier" in source
    names = run("README.md")
    assert names["label"] in {"cat", "dog", "owl"}


def test_the_two_clients_of_the_deployment_page_agree(run, tmp_path):
    """The ONNX one resizes with Pillow, whose pixels differ by a level here and there."""
    pytest.importorskip("onnxruntime")
    names = run("docs/deploy.md")
    assert {entry["label"] for entry in names["prompter"].read_answer(names["answer"])} == {
        "mountain",
        "valley",
        "bridge",
    }
    light = np.asarray(Image.open(tmp_path / "prompted.png")).astype(int)
    assert abs(light - np.asarray(names["prompter"](names["image"]))).max() <= 2


def test_links_inside_the_repository_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_scripts_targets_and_results_that_a_page_names_exist():
    """But for scripts in a block that first checks out the commit that has them."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    missing = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found = re.findall(r"benchmarks/results/[\w.]+\w", text)
        for block in blocks(page, "bash"):
            found += [] if "git checkout" in block else re.findall(r"(?:examples|benchmarks)/\w+\.py", block)
            missing += [
                f"{page}: make {target}"
                for target in re.findall(r"^make ([\w-]+)", block, flags=re.MULTILINE)
                if f"\n{target}:" not in makefile
            ]
        missing += [f"{page}: {name}" for name in dict.fromkeys(found) if not (ROOT / name).exists()]
    assert not missing


def test_options_that_a_page_names_exist():
    """In commands of the scripts, and alone in backticks; but for commands of an earlier commit."""
    files = [path for folder in ("examples", "benchmarks") for path in ROOT.joinpath(folder).glob("*.py")]
    sources = {path.stem: path.read_text(encoding="utf-8") for path in files}
    trainer = " ".join(field.name for field in dataclasses.fields(transformers.TrainingArguments))
    missing = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = [("\n".join(sources.values()), option) for option in re.findall(r"`--(\w+)", text)]
        for block in blocks(page, "bash"):
            commands = "" if "git checkout" in block else block.replace("\\\n", " ")
            for script, options in re.findall(r"(?:examples|benchmarks)/(\w+)\.py(.*)", commands):
                named += [(sources[script], option) for option in re.findall(r"--(\w+)", options)]
        missing += [f"{page}: {option}" for source, option in named if option not in source + trainer]
    assert not missing


def test_every_public_object_and_config_field_is_documented():
    for name in pgn_peft.__all__:
        if name != "__version__":
            assert getattr(pgn_peft, name).__doc__
    for field in own_fields():
        assert f"\n    {field.name}: " in inspect.getdoc(pgn_peft.PGNConfig), field.name


def test_the_floor_of_peft_is_the_same_everywhere():
    from pgn_peft.registration import PEFT_FLOOR

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floor = next(line for line in project["dependencies"] if line.startswith("peft"))
    assert PEFT_FLOOR.startswith(floor.removeprefix("peft>="))
    assert (ROOT / "pgn_peft/py.typed").exists()


@pytest.mark.parametrize(("name", "draw"), [("method", "draw"), ("client", "draw_client")])
def test_drawn_pictures_have_no_small_text(name, draw, monkeypatch):
    import matplotlib.text

    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import draw_method

    texts = [text for text in getattr(draw_method, draw)().findobj(matplotlib.text.Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 10  # points, at the SVG's own width of 9.6 inches
    assert (draw_method.FOLDER / f"{name}.svg").stat().st_size < 150_000


def test_the_table_of_fields_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs/field_table.py"))["page_with_table"]()
    assert page == (ROOT / "docs/config.md").read_text(encoding="utf-8"), "run docs/field_table.py"


def test_the_citation_file_names_the_paper_of_the_readme():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    (bibtex,) = blocks("README.md", "bibtex")
    for fact in (paper["title"], authors, paper["collection-title"], str(paper["year"])):
        assert fact in bibtex


# Figures and their rows.

RESULTS = ROOT / "benchmarks/results"
DATA = {
    "EuroSAT": "eurosat",
    "CIFAR-100": "cifar100",
    "Flowers-17": "flowers17",
    "EuroSAT shuffled": "eurosat+shuffled",
}
FIGURE = r"\b[01]\.\d{3}\b"


def sections(page):
    """Each section's title, the results files that it cites, and its tables as lists of rows of cells.

    It names them itself, or benchmarks/results/README.md says that it cites them.
    """
    listed = re.findall(r"^\| `(.+?)` \| (.+?) \|", (RESULTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    level = "^##? " if page.startswith("docs") else "^#+ "
    for section in re.split(level, (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        tables, (title, *lines) = [], section.splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            if line.startswith("|"):
                if not before.startswith("|"):
                    tables.append([])
                tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        names = set(re.findall(r"benchmarks/results/(\w+\.jsonl)", section))
        yield title, names | {name for name, places in listed if page in places and title in places}, tables


def numbers_in(value):
    """All numbers in a row of results, also in what it holds."""
    if isinstance(value, dict):
        return {f"{name}.{path}": n for name, part in value.items() for path, n in numbers_in(part).items()}
    return {"": value} if isinstance(value, float) else {}


@functools.cache
def figures_of(name):
    """What rows of a results file may be cited as: their numbers, means and spreads of the tested seeds."""
    rows = list(Results(RESULTS / name))
    found = [number for row in rows for number in numbers_in(row).values()]
    groups = {}
    for row in rows:
        for path, number in numbers_in(row.get("accuracy", {})).items():  # of corruptions: the mean over strengths
            groups.setdefault((id(row), path.partition(" ")[0]), []).append(number)
        settings = {key: value for key, value in row.get("settings", {}).items() if key != "seed"}
        for path, number in numbers_in(row).items():
            groups.setdefault((json.dumps(settings), path), []).append(number)
    found += [statistics.mean(numbers) for numbers in groups.values()]
    found += [statistics.stdev(numbers) for numbers in groups.values() if len(numbers) > 1]
    return {f"{number:.3f}" for number in found}


@pytest.mark.parametrize(
    "page",
    ["README.md", "benchmarks/results/README.md", "docs/deploy.md", "docs/results.md", "docs/what-failed.md"],
)
def test_every_figure_of_a_table_is_in_the_rows_that_its_section_names(page):
    missing, checked = [], 0
    for title, names, tables in sections(page):
        known = set().union(*map(figures_of, names))
        for cell in (cell for table in tables for row in table for cell in row if names):
            checked += len(re.findall(FIGURE, cell))
            missing += [f"{title}: {figure}" for figure in re.findall(FIGURE, cell) if figure not in known]
    assert checked >= 6
    assert not missing, f"figures without a row: {missing}"


@pytest.mark.parametrize(
    ("page", "name", "fewest"),
    [
        ("README.md", "own_size.jsonl", 6),
        ("docs/results.md", "own_size.jsonl", 9),
        ("docs/results.md", "adaptation.jsonl", 25),
        ("docs/results.md", "few_images.jsonl", 60),
    ],
)
def test_the_tables_of_methods_say_what_the_report_says(page, name, fewest):
    cells = report.chosen(report.read(Results(RESULTS / name)))
    methods = {text.strip("*"): method for method, text in report.LATENT.items()}
    checked = 0
    for _, names, tables in sections(page):
        for table in tables[:1] if name in names else ():  # the others are of other models and questions
            columns = [re.sub("^[^,]*", lambda match: DATA.get(match[0], match[0]), column) for column in table[0]]
            for row in table[2:]:
                method = methods.get(row[0].replace("**", ""))
                for column, text in zip(columns, row, strict=True):
                    if (column, method) in cells and table[0][0] == "method":
                        mean, *spread = re.findall(FIGURE, text)
                        expected = str(cells[column, method])
                        assert expected.startswith(mean), (row[0], column, expected)
                        assert not spread or f"± {spread[0]} " in expected, (row[0], column, expected)
                        checked += 1
    assert checked >= fewest
