"""The scripts that users copy: their smoke modes, resuming after a kill. Two processes: test_many_processes.py.

Scripts run in this process by their `main`, where a start takes seconds less. Nothing here can reach the network.
"""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import train_image_classifier
from conftest import ENVIRONMENT, ROOT, answer, tiny_config, tiny_vit, with_output
from huggingface_hub import ModelCard
from image_data import DataArguments, load_splits, smoke_arguments
from peft import AutoPeftModel, LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPImageProcessor,
    ViTImageProcessor,
)

from pgn_peft import Classifier, load_classifier
from pgn_peft.hub import ModelCardInfo
from pgn_peft.training.rungs import replace_head

NUMBER = r"(\d+\.\d+)"
ANY = (1e-9, 1e9)  # what depends on the machine: a time, or a ratio of times

# script -> what its smoke mode prints in the end, and the bounds of the figure in it
FIGURES = {
    "adapt_black_box": (f"test accuracy {NUMBER}", 1, 1),
    "demo": (f"test accuracy of PGN {NUMBER}", 0.25, 1),  # guessing gives 0.17
    "deploy_input_only": (f"accuracy prompted {NUMBER}", 1, 1),
    "import_official": (f"largest difference between the adapter's prompts and the network's: {NUMBER}", 0, 0),
    "predict": (f"80 images, mean score of the best label {NUMBER}", 0.51, 0.99),
    "share_on_hub": (f"largest difference of a logit after loading {NUMBER}", 0, 0),
    "show_prompts": (f"blue: .* -> blue, score {NUMBER}", 0.5, 1),
    "train_image_classifier": (f"test accuracy {NUMBER}", 1, 1),
    "adaptation": (rf"\| full fine-tuning \| 23,970 \| {NUMBER} \(", 1, 1),
    "input_only": (rf"\| border \(VP\) \| 1,410 \| {NUMBER} \(", 1, 1),  # as PNG
    "black_box": (rf"\| embedding \| PNG \| 1 \| 1.000 \| {NUMBER} \|", 1, 1),
    "inversion": (rf"\| 8-bit \| 1.000 \| {NUMBER} \|", 1, 1),
    "memory": (r"\| method \| tiny, batch (\d+), float32 \|", 8, 8),  # peaks need processes of their own
    "pictures": (f"two pictures, {NUMBER} kB", 20, 200),
    "report": (rf"\| \*\*PGN\*\* \| 456,698 to 474,068 \| {NUMBER} ", 0.871, 0.871),  # of recorded results
    "step_time": (f"training step, PGN / static prompts: {NUMBER}", *ANY),
}


def train(command, *more):
    """Run the training script in this process, and return its results."""
    return train_image_classifier.main([str(word) for word in (*command, *more)])


def test_every_script_has_a_figure():
    paths = [path for folder in ("examples", "benchmarks") for path in ROOT.joinpath(folder).glob("*.py")]
    scripts = {path.stem for path in paths if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == {*FIGURES, "faults"}  # of which tests/test_faults.py runs a part


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if ROOT.joinpath(f"examples/{name}.py").exists() else pytest.mark.slow)
        for name in FIGURES
    ],
)
def test_smoke_mode_ends_with_its_figure(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Offline the Hub's client calls nobody, not even the server that a script starts on this machine.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    script = importlib.import_module(name)
    if name == "memory":  # which measures each model in a process of its own
        monkeypatch.setattr(script, "in_own_process", script.measure)
    script.main(["--smoke"])
    pattern, low, high = FIGURES[name]
    figures = re.findall(pattern, capsys.readouterr().out)
    assert figures
    assert low <= float(figures[-1]) <= high


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny ViT and a folder of JPEGs, as the training script's smoke mode makes them, and the command line."""
    folder = tmp_path_factory.mktemp("material")
    return folder, [*smoke_arguments(folder), "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished") / "adapter"
    train(with_output(material[1], folder))
    return folder


@pytest.fixture(scope="module")
def server(material):
    """The address of a server of the tiny ViT, in a process of its own."""
    from deploy_input_only import hosted

    with hosted(str(material[0] / "vit")) as url:
        yield url


@pytest.mark.slow
def test_training_ends_with_an_adapter_a_stranger_can_use(finished):
    folder = finished
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["test_accuracy"] == results["validation_accuracy"] == 1
    assert results["train_images"] == 64
    model = AutoPeftModel.from_pretrained(str(folder))
    assert model.config.id2label == {0: "blue", 1: "red"}
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 32
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"```python\nimport pgn_peft", card)
    assert "More Information Needed" not in card
    assert f"| trainable parameters | {results['trainable_parameters']:,} |" in card
    assert "| images | test | accuracy | 1 |" in card
    assert re.search(r"\| epoch \| step \| training_loss \| loss \|.* accuracy \|", card)
    assert "| training images | 64 |" in card


# A training script whose process is killed while it writes the second of three checkpoints.
KILLED = """
import os, signal, sys
import torch, train_image_classifier
save = torch.save
def save_half(state, file, *args, **kwargs):
    if "checkpoint-16" in str(file):
        open(file, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file, *args, **kwargs)
torch.save = save_half
train_image_classifier.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(finished, material, tmp_path):
    folder = tmp_path / "killed"
    command = with_output(material[1], folder)
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)])}
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert (folder / "checkpoint-16/adapter_model.safetensors").exists()
    assert not (folder / "adapter_model.safetensors").exists()
    with pytest.raises(SystemExit, match="holds checkpoints of another run"):
        train(command)
    results = train(command, "--resume_from_checkpoint", "true")
    assert results["test_accuracy"] == 1
    expected = load_file(finished / "adapter_model.safetensors")
    resumed = load_file(folder / "adapter_model.safetensors")
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, msg=f"{name} differs after resuming")


@pytest.mark.slow
def test_parquet_files_another_size_and_a_static_control(material, tmp_path):
    from datasets import load_dataset

    images = load_dataset("imagefolder", data_dir=str(material[0] / "images"))["train"]
    cut = images.train_test_split(test_size=0.4, stratify_by_column="label", seed=0)
    rest = cut["test"].train_test_split(test_size=0.5, stratify_by_column="label", seed=0)
    for name, rows in {"train": cut["train"], "validation": rest["train"], "test": rest["test"]}.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
    command = with_output(material[1], tmp_path / "adapter", "--image_size", "48", "--generator", "static")
    command[command.index("--dataset") + 1] = str(tmp_path)
    results = train(command, "--max_train_samples", "40", "--recipe", "sgd", "--learning_rate", "0.02")
    assert results["train_images"] == 40
    model = AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    assert answer(model, torch.zeros(1, 3, 48, 48), interpolate_pos_encoding=True).shape == (1, 2)
    assert "interpolate_pos_encoding=True" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--output_dir": f"{os.devnull}/nowhere"}, "nowhere"),
        (
            {"--label_column": "species"},
            "There is no column 'species', but image, label. Choose one with --label_column",
        ),
        ({"--generator": "resnet18"}, "generator"),
    ],
)
def test_bad_arguments_are_found_before_training(material, tmp_path, change, message):
    command = with_output(material[1], tmp_path / "adapter")
    for name, value in change.items():
        if name in command:
            command[command.index(name) + 1] = value
        else:
            command += [name, value]
    with pytest.raises((OSError, ValueError), match=re.escape(message)):
        train(command)
    assert not list(tmp_path.glob("adapter/checkpoint-*"))


def split_sizes(folder, **arguments):
    return {split: len(rows) for split, rows in load_splits(DataArguments(str(folder), **arguments)).items()}


@pytest.fixture(scope="module")
def images(material):
    from datasets import load_dataset

    return load_dataset("imagefolder", data_dir=str(material[0] / "images"))["train"]


@pytest.mark.slow
def test_sources_with_some_splits_only(images, tmp_path):
    images.to_parquet(tmp_path / "train.parquet")
    assert split_sizes(tmp_path) == {"train": 64, "validation": 8, "test": 8}
    for wanted in (2, 63, 99):
        sizes = split_sizes(tmp_path, max_train_samples=wanted)
        assert sizes == {"train": min(wanted, 64), "validation": 8, "test": 8}
    with pytest.raises(ValueError, match="`max_train_samples` is 1, less than one image of each class"):
        split_sizes(tmp_path, max_train_samples=1)
    images.to_parquet(tmp_path / "test.parquet")
    assert split_sizes(tmp_path) == {"train": 72, "validation": 8, "test": 80}
    (tmp_path / "test.parquet").rename(tmp_path / "valid.parquet")
    assert split_sizes(tmp_path) == {"train": 80, "validation": 80}
    (tmp_path / "train.parquet").rename(tmp_path / "training.parquet")
    with pytest.raises(ValueError, match="has no split 'train', but training, validation"):
        split_sizes(tmp_path)


@pytest.mark.slow
def test_files_cut_as_on_the_hub(images, tmp_path):
    (tmp_path / "data").mkdir()
    for split, shards in {"train": 2, "test": 1}.items():
        for index in range(shards):
            images.to_parquet(tmp_path / f"data/{split}-{index:05}-of-{shards:05}.parquet")
    assert split_sizes(tmp_path) == {"train": 144, "validation": 16, "test": 80}


@pytest.mark.slow
def test_few_images_are_split_too_and_a_class_with_too_few_is_named(material, tmp_path):
    with pytest.raises(ValueError, match="There is no folder './nowhere'. Look for a misspelt path"):
        split_sizes("./nowhere")
    shutil.copytree(material[0] / "images", tmp_path / "images")
    for name, number in {"red": 3, "blue": 4}.items():
        for file in sorted((tmp_path / "images" / name).iterdir())[number:]:
            file.unlink()
    assert split_sizes(tmp_path / "images") == {"train": 3, "validation": 2, "test": 2}
    next((tmp_path / "images/red").iterdir()).unlink()
    with pytest.raises(ValueError, match="Too few images of red to keep some for validation and test"):
        split_sizes(tmp_path / "images")


@pytest.mark.slow
def test_resuming_with_another_adapter_is_refused(finished, material, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "adapter")
    command = with_output(material[1], folder, "--resume_from_checkpoint", "true")
    for change, field in ({"--library_size": "9"}, "library_size"), ({"--generator_norm": "group"}, "generator_norm"):
        with pytest.raises(SystemExit, match=f"{field} is .*, but .* in the run to resume"):
            train(command, *next(iter(change.items())))


def test_the_official_recipe_is_sgd_with_a_long_warm_up(tmp_path):
    arguments = train_image_classifier.Arguments(output_dir=str(tmp_path), recipe="sgd", use_cpu=True)
    assert (arguments.learning_rate, arguments.warmup_steps) == (0.1, 0.5)
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.01}
    assert arguments.library_learning_rate == arguments.head_learning_rate == 0.1
    assert train_image_classifier.Arguments(output_dir=str(tmp_path), use_cpu=True).learning_rate == 1e-3


@pytest.mark.slow
def test_prompts_in_all_layers_are_one_option_away(material, tmp_path):
    folder = tmp_path / "deep"
    train(with_output(material[1], folder, "--prompt_depth", "0", "--num_train_epochs", "1"))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["prompt_depth"] == 2
    assert (
        load_file(folder / "adapter_model.safetensors")["base_model.model.vit.embeddings.pgn_library.tokens"].ndim == 3
    )
    assert "| layers with prompts of their own | 2 |" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("images", "options", "epochs", "steps"),
    [
        (20, {}, 100, 8),  # one step an epoch
        (1000, {}, 12, None),
        (20, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}, 50, 8),
    ],
)
def test_few_images_are_trained_on_for_a_hundred_steps(images, options, epochs, steps, tmp_path):
    arguments = train_image_classifier.Arguments(output_dir=str(tmp_path), use_cpu=True, **options)
    arguments.choose_epochs(images)
    assert arguments.num_train_epochs == epochs
    assert arguments.eval_strategy == arguments.save_strategy == ("epoch" if steps is None else "steps")
    assert steps is None or arguments.eval_steps == arguments.save_steps == steps


@pytest.mark.slow
def test_a_run_on_few_images_can_be_resumed(material, tmp_path, capsys):
    position = material[1].index("--num_train_epochs")
    command = material[1][:position] + material[1][position + 2 :]
    few = with_output(command, tmp_path / "few", "--max_train_samples", "8", "--save_total_limit", "20")
    results = train(few)
    assert results["epochs"] == 100
    assert "8 training images: 100 epochs" in capsys.readouterr().out
    checkpoints = sorted(path.name for path in (tmp_path / "few").glob("checkpoint-*"))
    assert len(checkpoints) == 13  # after every eight epochs, and at the end
    shutil.rmtree(tmp_path / "few" / "checkpoint-100")
    assert train([*few, "--resume_from_checkpoint", "true"])["test_accuracy"] == results["test_accuracy"]
    assert "resuming from" in capsys.readouterr().out


def test_a_frozen_head_needs_the_models_own_classes(material, tmp_path):
    with pytest.raises(SystemExit, match="Add --label_mapping true"):
        train(with_output(material[1], tmp_path / "adapter", "--head", "frozen"))
    with pytest.raises(SystemExit, match="--optim sgd is not used"):
        train(with_output(material[1], tmp_path / "adapter", "--optim", "sgd"))


@pytest.mark.slow
def test_an_input_only_adapter_is_trained_and_deployed_on_your_own_images(
    material, server, tmp_path, monkeypatch, capsys
):
    """The two commands of the README, typed as there, on a folder of JPEGs, for a server that is running."""
    import deploy_input_only

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _, command = material
    folder = tmp_path / "input-only"
    more = "--prompt_space pixel --head frozen --label_mapping true --num_virtual_tokens 16 --learning_rate 0.03"
    results = train(with_output(command, folder, *more.split(), "--num_train_epochs", "6"))
    assert results["test_accuracy"] == 1
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config["label_mapping"]) == [0, 1]
    assert config["image_size"] is None or config["image_size"] == 32
    assert {path.name for path in (folder / "prompter").iterdir()} == {"prompter.safetensors", "prompter_config.json"}
    options = dict(zip(command[::2], command[1::2], strict=False))
    deploy = ["--model_name_or_path", options["--model_name_or_path"], "--dataset", options["--dataset"]]
    deploy += ["--url", server, "--prompter"]
    figures = deploy_input_only.main([*deploy, str(folder / "prompter")])
    assert figures["agreement with the model at hand"] == figures["accuracy prompted"] == 1
    assert "the server sees what it is sent" in capsys.readouterr().out
    figures = deploy_input_only.main([*deploy, str(folder / "prompter"), "--fit_images", "20", "--top_k", "1"])
    assert figures["accuracy prompted"] == 1
    assert re.search(r"a head fitted to 20 answers \((ridge|mapping)\): 1.000 held out", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "prompt_space"), [("Dinov2", "latent"), ("Siglip", "pixel")])
def test_other_families_whose_processor_makes_another_size_than_the_checkpoint(
    family, prompt_space, material, tmp_path
):
    # DINOv2 as released: position embeddings for 518 px, an image processor that cuts out 224.
    tiny_vit(f"{family}ForImageClassification", image_size=48).save_pretrained(tmp_path / "base")
    processor = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "base")
    number = "16" if prompt_space == "pixel" else "4"
    more = ["--prompt_space", prompt_space, "--num_virtual_tokens", number]
    command = with_output(material[1], tmp_path / "adapter", *more)
    command[command.index("--model_name_or_path") + 1] = str(tmp_path / "base")
    assert train(command)["test_accuracy"] == 1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["image_size"] == (32 if prompt_space == "pixel" else None)
    assert config["head_features"] == (64 if family == "Dinov2" else None)
    told = "interpolate_pos_encoding" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert told == (family != "Dinov2")
    answers = load_classifier(tmp_path / "adapter").pipeline()(Image.new("RGB", (60, 44), "red"))
    assert {each["label"] for each in answers} == {"blue", "red"}


def predictions(file):
    with open(file, newline="", encoding="utf-8") as rows:
        return list(csv.DictReader(rows))


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_csv(finished, material, tmp_path, capsys):
    import predict

    images = shutil.copytree(material[0] / "images", tmp_path / "images")
    (images / "blue/broken.png").write_bytes(b"no image")
    (images / "blue/cut.jpg").write_bytes((images / "blue/0.jpg").read_bytes()[:500])
    (images / "notes.txt").write_text("no image either", encoding="utf-8")
    command = ["--adapter", str(finished), "--images", str(images), "--output", str(tmp_path / "out.csv")]
    predict.main([*command, "--batch_size", "7", "--top_k", "5"])
    rows = predictions(tmp_path / "out.csv")
    assert list(rows[0]) == ["image", "label", "score", "label_2", "score_2"]
    assert len(rows) == len({row["image"] for row in rows}) == 80
    assert all(row["image"].startswith(row["label"] + "/") for row in rows)
    assert all(float(row["score"]) + float(row["score_2"]) == pytest.approx(1, abs=1e-5) for row in rows)
    captured = capsys.readouterr()
    assert "skipped 2 of 82 files that could not be read" in captured.out
    assert f"skipping {images / 'blue/broken.png'}: " in captured.err
    assert f"skipping {images / 'blue/cut.jpg'}: " in captured.err
    with pytest.raises(SystemExit, match="broken.png"):
        predict.main([*command, "--strict"])


def test_images_of_any_shape_go_through_a_processor_that_cuts_nothing_off(tmp_path, capsys):
    import predict

    model = get_peft_model(tiny_vit(), tiny_config(id2label={0: "blue", 1: "red"}))
    tiny_vit().save_pretrained(tmp_path / "vit")
    model.get_base_model().name_or_path = model.peft_config["default"].base_model_name_or_path = str(tmp_path / "vit")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    Classifier(model, processor).save_pretrained(tmp_path / "adapter")
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(40, 32), (32, 64), (50, 50)]):
        Image.new("RGB", size).save(tmp_path / f"images/{number}.png")
    command = ["--adapter", str(tmp_path / "adapter"), "--images", str(tmp_path / "images")]
    predict.main([*command, "--output", str(tmp_path / "out.csv")])
    assert len(predictions(tmp_path / "out.csv")) == 3


@pytest.mark.slow
def test_what_cannot_be_predicted_is_refused(finished, tmp_path):
    import predict

    command = ["--adapter", str(finished), "--output", str(tmp_path / "out.csv"), "--images"]
    with pytest.raises(SystemExit, match="There is no folder 'nowhere'"):
        predict.main([*command, "nowhere"])
    with pytest.raises(SystemExit, match="There are no images"):
        predict.main([*command, str(tmp_path)])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="could be read; see above"):
        predict.main([*command, str(tmp_path)])


@pytest.mark.slow
def test_a_dry_run_shows_what_would_be_published(finished, material, capsys):
    import share_on_hub

    options = ["--dataset_name", "Colours", "--license", "mit", "--description", "Tells *red* from blue.", "--dry_run"]
    assert share_on_hub.main(["--adapter", str(finished), *options]) == 0
    card = ModelCard.load(finished / "to-publish/adapter/README.md")
    assert (card.data.eval_results[0].dataset_name, card.data.eval_results[0].metric_value) == ("Colours", 1.0)
    assert card.data.license == "mit"
    assert "Tells *red* from blue." in card.text
    assert card.text.strip() in capsys.readouterr().out
    shutil.rmtree(finished / "to-publish")
    more = ["--repo_id", "user/colours", "--metric", "f1=0.5"]
    share_on_hub.main(["--adapter", str(finished), *options, *more])
    card = ModelCard.load(finished / "to-publish/colours/README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["f1"]
    shutil.rmtree(finished / "to-publish")
    for wrong in (["--metric", "f1"], ["--metric", "f1=good"]):
        with pytest.raises(SystemExit):
            share_on_hub.main(["--adapter", str(finished), *options, *wrong])


@pytest.mark.slow
def test_a_server_answers_whatever_it_is_sent(material, server):
    import urllib.error
    import urllib.request

    for body in (b"no image", b'{"inputs": 7}', b""):
        request = urllib.request.Request(server, data=body, headers={"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
    image = next((material[0] / "images/red").iterdir()).read_bytes()
    with urllib.request.urlopen(urllib.request.Request(server, data=image)) as reply:
        assert {"label", "score"} == json.load(reply)[0].keys()


def test_the_images_decide_on_the_method(material, tmp_path, capsys):
    command = with_output(material[1], tmp_path / "adapter", "--method", "auto")
    results = train(command)
    printed = capsys.readouterr().out
    assert "8 validation images decide nothing below 35 points" in printed
    assert results["chosen"] == "linear head"  # red and blue images
    assert results["test_accuracy"] == 1
    assert [found["name"] for found in results["methods"]][:2] == ["linear head", "untrained prompts"]
    assert json.loads((tmp_path / "adapter/results.json").read_text()) == results
    assert (tmp_path / "adapter/methods.png").stat().st_size > 5000
    assert "| **linear head** | 1.000 ± 0.0" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    image = next((material[0] / "images/red").iterdir())
    assert load_classifier(tmp_path / "adapter").pipeline()(str(image))[0]["label"] == "red"
    before = (tmp_path / "adapter/ladder/ladder.json").read_bytes()
    train(command)  # goes on from the results that are there
    assert (tmp_path / "adapter/ladder/ladder.json").read_bytes() == before
    with pytest.raises(ValueError, match="other seed"):
        train(command, "--seed", "7")
    with pytest.raises(ValueError, match="other training images"):
        train(command, "--image_size", "64")
    with pytest.raises(SystemExit, match="does not use --generator and --push_to_hub"):
        train(command, "--generator", "static", "--push_to_hub", "true")


def test_a_model_whose_weights_changed_is_saved_whole(tmp_path):
    """Files of the adapter that an earlier run chose are gone, and the other way round."""
    import predict

    base, labels = tiny_vit(), {0: "blue", 1: "red"}
    base.save_pretrained(tmp_path / "vit")
    base.name_or_path = str(tmp_path / "vit")
    processor, folder = ViTImageProcessor(size={"height": 32, "width": 32}), tmp_path / "chosen"
    adapted = get_peft_model(base, tiny_config(id2label=labels))
    train_image_classifier.save_chosen(adapted, processor, folder, ModelCardInfo(), True)
    changed = tiny_vit()
    replace_head(changed, labels)
    lora = get_peft_model(changed, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    torch.nn.init.normal_(lora.base_model.model.classifier.modules_to_save["default"].weight)
    pixels = torch.randn(2, 3, 32, 32)
    expected = answer(lora.eval(), pixels)
    train_image_classifier.save_chosen(lora, processor, folder, ModelCardInfo(), False)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(answer(loaded, pixels), expected)
    assert loaded.config.id2label == labels
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    command = ["--images", str(tmp_path / "red.png"), "--output", str(tmp_path / "new/out.csv")]
    predict.main(["--adapter", str(folder), *command])
    assert predictions(tmp_path / "new/out.csv")[0]["image"] == "red.png"
    train_image_classifier.save_chosen(adapted, processor, folder, ModelCardInfo(), True)
    assert set(load_classifier(folder).model.config.id2label.values()) == {"blue", "red"}
    assert not (folder / "config.json").exists()


@pytest.mark.slow
def test_an_adapter_is_continued_with_other_classes(finished, material, tmp_path, capsys):
    """`ignore_mismatched_sizes=True` would start the rows of all classes anew."""
    images = shutil.copytree(material[0] / "images", tmp_path / "images")
    (images / "green").mkdir()
    for number in range(20):
        Image.new("RGB", (36, 40), (40, 150 + 5 * number, 40)).save(images / f"green/{number}.png")
    command = with_output(material[1], tmp_path / "adapter", "--adapter", str(finished), "--max_steps", "1")
    command[command.index("--dataset") + 1] = str(images)
    train(command, "--learning_rate", "1e-9", "--refit_head", "false")
    assert "2 of 3 classes are the same, 2 were there" in capsys.readouterr().out
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (finished, tmp_path / "adapter"))
    head = "base_model.model.classifier.pgn_head.weight"
    assert load_classifier(tmp_path / "adapter").model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    torch.testing.assert_close(after[head][[0, 2]], before[head], atol=1e-6, rtol=0)
    library = "base_model.model.vit.embeddings.pgn_library.tokens"
    torch.testing.assert_close(after[library], before[library], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_images_with_several_labels(material, images, tmp_path):
    names = [["blue"], ["red"]]
    rows = images.add_column("tags", [[*names[label], "colour"] for label in images["label"]])
    rows.remove_columns("label").to_parquet(tmp_path / "train.parquet")
    command = with_output(material[1], tmp_path / "adapter", "--label_column", "tags", "--num_train_epochs", "6")
    command[command.index("--dataset") + 1] = str(tmp_path)
    assert train(command)["test_f1"] > 0.9
    answers = load_classifier(tmp_path / "adapter").pipeline()(Image.new("RGB", (36, 40), (200, 40, 40)))
    assert {answer["label"] for answer in answers if answer["score"] > 0.5} == {"colour", "red"}


@pytest.mark.parametrize(
    ("cores", "processes", "accelerated", "workers"),
    [(16, 4, True, 3), (16, 1, False, 0)],
)
def test_the_loader_gets_the_cores_that_a_process_has(cores, processes, accelerated, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    arguments = train_image_classifier.Arguments(str(tmp_path), use_cpu=not accelerated)
    assert arguments.dataloader_num_workers == workers
