"""What the documentation says: its code runs, its commands exist, its links lead somewhere."""

import inspect
import re
import runpy
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_vit
from peft import get_peft_model
from pgn_peft.tuner.fields import own_fields
from PIL import Image
from tiny_clip import tokenizer, two_towers

import pgn_peft
from pgn_peft import Classifier, PGNConfig
from pgn_peft.prompter import EmbeddingsClient
from pgn_peft.utils.markdown import CITATION

ROOT = Path(__file__).parents[1]
GUIDES = sorted(str(path.relative_to(ROOT)) for path in ROOT.joinpath("docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *GUIDES]


# checkpoint -> the folder with a tiny model in its place
STAND_INS = {
    "google/vit-base-patch16-224": "vit",
    "openai/clip-vit-base-patch32": "clip",
    "openai/clip-vit-base-patch16": "two-towers",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a page's code top to bottom in one session, with tiny stand-ins for the checkpoint, images and training."""
    import transformers
    from transformers import ViTImageProcessor

    tiny_vit(num_labels=1000).save_pretrained(tmp_path / "vit")
    tiny_vit("CLIPVisionModelWithProjection", projection_dim=512).save_pretrained(tmp_path / "clip")
    two_towers().save_pretrained(tmp_path / "two-towers")
    tokenizer().save_pretrained(tmp_path / "two-towers")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 3} for n in range(6)]
    monkeypatch.setattr(transformers.TrainingArguments, "num_train_epochs", 1)
    monkeypatch.setattr(
        EmbeddingsClient,
        "__call__",
        lambda _, images: torch.randn(len(images) if isinstance(images, list) else 1, 512),
    )
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
        and {group["lr"] for group in names["groups"]} == {1e-3, 1e-2, 3e-3}
        and 0 <= names["alone"].linear <= 1
        and names["logits"].shape == (6, 3)
    ),
}


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python") and page != "docs/deploy.md"])
def test_the_guides_code_runs(page, run):
    assert OUTCOMES[page](run(page))


def test_the_arithmetic_of_many_gpus_is_what_its_script_prints(capsys):
    import arithmetic

    arithmetic.main([])
    printed = capsys.readouterr().out
    assert "hours an epoch" in printed
    assert f"```text\n{printed}```\n" in (ROOT / "docs/costs.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_targets_that_commands_name_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks(page, "bash"):
        for script in re.findall(r"(?:examples|benchmarks)/\w+\.py", block):
            assert (ROOT / script).is_file(), script
        for target in re.findall(r"^make (\w+)", block, flags=re.MULTILINE):
            assert f"\n{target}:" in makefile, target


def test_every_public_object_and_config_field_is_documented():
    for name in pgn_peft.__all__:
        if name != "__version__":
            assert getattr(pgn_peft, name).__doc__
    for field in own_fields():
        assert f"\n    {field.name}: " in inspect.getdoc(pgn_peft.PGNConfig), field.name


def test_the_floor_of_peft_is_the_same_everywhere():
    from pgn_peft.tuner.registration import PEFT_FLOOR

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floor = next(line for line in project["dependencies"] if line.startswith("peft"))
    assert PEFT_FLOOR.startswith(floor.removeprefix("peft>="))
    assert (ROOT / "pgn_peft/py.typed").exists()


def test_the_picture_of_the_method_has_no_small_text(monkeypatch):
    import matplotlib.text

    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import draw_method

    texts = [text for text in draw_method.draw().findobj(matplotlib.text.Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 10  # points, at the SVG's own width of 9.6 inches
    assert draw_method.FILE.stat().st_size < 150_000


def test_the_table_of_fields_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs/field_table.py"))["page_with_table"]()
    assert page == (ROOT / "docs/config.md").read_text(encoding="utf-8"), "run docs/field_table.py"


def test_the_citation_file_names_the_paper_of_the_model_cards():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for fact in (paper["title"], authors, paper["collection-title"], str(paper["year"])):
        assert fact in CITATION
