"""The card of an adapter: what the Hub reads in it, that its code runs, and that nothing breaks it."""

import re

import numpy as np
import pytest
import torch
from conftest import move_adapter, tiny_config, tiny_vit
from hub_repositories import metadata_errors
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from pgn_peft import Classifier, ModelCardInfo
from pgn_peft.hub.publishing import make_card
from pgn_peft.tuner.adapters import num_parameters
from pgn_peft.utils.markdown import CITATION

NAMES = {0: "cat", 1: "dog"}
FACTS = ModelCardInfo(
    dataset_name="Pets",
    dataset_id="user/pets",
    metrics={"accuracy": 0.9375},
    hyperparameters={"learning rate": 3e-3, "epochs": 2},
    training_log=[{"Epoch": 1.0, "Accuracy": 0.5}, {"Epoch": 2.0, "Accuracy": 0.93751}],
    license="apache-2.0",
    description="Knows pets from *photographs* only.",
)


def adapted(base="user/vit", **config):
    model = get_peft_model(tiny_vit(num_labels=10), tiny_config(**({"id2label": NAMES} | config)))
    model.peft_config["default"].base_model_name_or_path = base
    return model


def test_the_metadata_is_what_the_hub_reads():
    card = make_card(adapted(), "user/adapter", FACTS)
    data = ModelCard(str(card)).data
    assert data.base_model == "user/vit"
    assert data.library_name == "peft"
    assert data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0"
    assert data.datasets == "user/pets"
    assert data.metrics == ["accuracy"]
    assert data.model_name == "adapter"
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "image-classification",
        "user/pets",
        "Pets",
    )
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("test", "accuracy", 0.9375)
    assert not metadata_errors(str(card))


def test_the_text_is_what_a_reader_wants():
    model = adapted()
    text = make_card(model, "user/adapter", FACTS).text
    assert "the frozen Vision Transformer `user/vit`" in text
    assert FACTS.description in text
    assert f"| trainable parameters | {model.get_nb_trainable_parameters()[0]:,} |" in text
    assert "cat, dog" in text
    assert "| Pets | test | accuracy | 0.9375 |" in text
    assert "| learning rate | 0.003 |" in text
    assert "| 2 | 0.9375 |" in text
    assert "apache-2.0. The base model keeps its own." in text
    assert CITATION in text
    assert "More Information Needed" not in text


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({}, "A [Prompt Generation Network](https://arxiv.org/abs/2210.06466) for the frozen Vision Transformer "
         "`user/vit`. For each image a light CNN mixes prompts out of a learned library: tokens, appended to its "
         "input. It is a [PEFT]"),
        ({"generator": "static"}, "Learned prompts for the frozen Vision Transformer `user/vit`. The prompts are the "
         "same for all images: tokens, appended to its input. It is a [PEFT]"),
        ({"generator": "static", "num_virtual_tokens": 0},
         "A linear head for the frozen Vision Transformer `user/vit`. It is a [PEFT]"),
    ],
)  # fmt: skip
def test_it_says_what_kind_of_adapter_this_is(fields, begins):
    text = str(make_card(adapted(**fields), "user/adapter", ModelCardInfo()))
    assert begins in " ".join(text.split())


def test_without_facts_it_claims_nothing():
    card = make_card(adapted(base="/models/vit"), "adapter", ModelCardInfo())
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "`/models/vit`" in card.text
    assert "The author has not stated one for the adapter." in card.text
    for heading in ("## Results", "## Training"):
        assert heading not in card.text


def test_its_code_runs_and_imports_pgn_peft_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vit(num_labels=10).save_pretrained("vit")
    model = move_adapter(get_peft_model(ViTForImageClassification.from_pretrained("vit"), tiny_config(id2label=NAMES)))
    Classifier(model, ViTImageProcessor(size={"height": 48, "width": 48})).save_pretrained("adapter", FACTS)
    image = Image.new("RGB", (50, 40), "red")
    image.save("image.jpg")
    blocks = re.findall(
        r"```python\n(.*?)```", (tmp_path / "adapter/README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert len(blocks) == 2
    assert len(blocks[0].strip().splitlines()) == 5
    for block in blocks:
        assert block.startswith("import pgn_peft")
        names = {"image": image}
        exec(block, names)
        assert (names["answer"]["label"] if "answer" in names else names["label"]) in NAMES.values()


EDITED = """---
license: mit
language: en
tags: [pgn-peft, birds]
---

# My adapter

Written by hand.

{}

And after it.
"""


def test_saving_again_keeps_what_people_wrote_into_a_card(tmp_path):
    """As spacy-huggingface-hub#7 asks for."""
    file = tmp_path / "README.md"
    file.write_text(EDITED.format("Nothing of ours."), encoding="utf-8")
    Classifier(adapted(), ViTImageProcessor()).save_pretrained(tmp_path, FACTS)
    for metric in ("accuracy", None):
        card = ModelCard.load(file)
        assert card.text.index("Written by hand") < card.text.index("And after it") < card.text.index("## Use")
        assert (card.data.language, card.data.library_name) == ("en", "peft")
        assert card.data.tags == ["pgn-peft", "image-classification", "vision", "birds"]
        assert card.data.metrics == (metric and [metric])  # ours, so it goes with the results
        assert card.text.count("## Use") == 1
        Classifier(adapted(), ViTImageProcessor()).save_pretrained(tmp_path)


def test_text_around_our_part_stays_in_its_place(tmp_path):
    file = tmp_path / "README.md"
    for _ in range(2):
        Classifier(adapted(), ViTImageProcessor()).save_pretrained(tmp_path, FACTS)
        text = file.read_text(encoding="utf-8")
        assert text.count("## Use") == 1
        file.write_text(text.replace("<!-- pgn-peft: begin", "Before.\n<!-- pgn-peft: begin") + "After.\n", "utf-8")
    text = ModelCard.load(file).text
    assert text.index("Before.") < text.index("## Use") < text.index("After.")
    assert ModelCard.load(file).data.license == "apache-2.0"


def test_the_empty_template_of_peft_is_no_text_of_peoples(tmp_path):
    model = adapted()
    for _ in range(2):
        model.save_pretrained(tmp_path)
        Classifier(model, ViTImageProcessor()).save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "More Information Needed" not in card.text
        assert card.text.count("## Use") == 1
        assert not [tag for tag in card.data.tags if tag.startswith("base_model:")]


def test_names_cannot_break_tables_or_metadata():
    names = {0: "a | b", 1: "two\nlines", 2: "---"}
    facts = ModelCardInfo(dataset_name="x: [y] | z\n---", metrics={"f1": 1})
    card = make_card(adapted(id2label=names), "user/adapter", facts)
    assert "a \\| b, two lines, ---" in card.text
    data = ModelCard(str(card)).data
    assert data.eval_results[0].dataset_name == facts.dataset_name
    assert data.base_model == "user/vit"


def test_many_labels_are_cut():
    text = make_card(adapted(id2label={n: f"class {n}" for n in range(60)}), "user/adapter", ModelCardInfo()).text
    assert "class 49, and 10 more" in text
    assert "class 50" not in text


def test_parameters_are_counted_frozen_or_not():
    model = adapted()
    trainable = model.get_nb_trainable_parameters()[0]
    model.requires_grad_(False)
    assert num_parameters(model, "default") == trainable


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"metrics": {"accuracy": 0.5}}, "{'accuracy': 0.5} on the data set None"),
        ({"dataset_name": "x", "metrics": {"accuracy": float("nan")}}, "{'accuracy': nan} on the data set x"),
    ],
)
def test_impossible_facts_are_refused(facts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelCardInfo(**facts)


def test_metrics_can_be_scalars_of_numpy_and_torch():
    for value in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)):
        card = make_card(adapted(), "user/adapter", ModelCardInfo(dataset_name="x", metrics={"accuracy": value}))
        assert ModelCard(str(card)).data.eval_results[0].metric_value == 0.5
        assert "| x | test | accuracy | 0.5 |" in card.text


def test_copies_of_modules_that_are_trained_are_not_counted_as_frozen():
    frozen = sum(parameter.numel() for parameter in tiny_vit(num_labels=10).parameters())
    text = make_card(adapted(modules_to_save=["vit.layernorm"]), "user/adapter", FACTS).text
    assert f"| frozen parameters of the base | {frozen:,} |" in text
