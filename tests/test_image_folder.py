"""Folders of images as the training script reads them: classes, splits, class numbers, images that cannot be read."""

import io
import os
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import image_data
import image_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def image(number=0):
    return Image.fromarray(np.full((8, 9, 3), number, np.uint8))


def make(folder, *names, count=2):
    """Write `count` images into each of these folders, or one under a full name."""
    for name in names:
        files = [name] if Path(name).suffix else [f"{name}/{number}.png" for number in range(count)]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            image().save(folder / file)
    return folder


def read(folder):
    """Images by class, for each split."""
    return {
        split: {name: rows["label"][:].count(index) for index, name in enumerate(rows.features["label"].names)}
        for split, rows in image_folder.read_folder(folder).items()
    }


def load(folder, **arguments):
    return image_data.load_splits(image_data.DataArguments(str(folder), **arguments), seed=0)


def test_classes_and_files_that_are_called_like_splits_are_all_used(tmp_path, capsys):
    make(tmp_path, "train", "test", "dev", count=4)
    make(tmp_path, *[f"test/train_{n}.jpg" for n in range(3)], *[f"dev/dev_board_{n}.jpg" for n in range(3)])
    assert read(tmp_path) == {"train": {"dev": 7, "test": 7, "train": 4}}
    assert "train: 18 images in 3 classes: dev (7), test (7), train (4)" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Train", "val", "evaluation")])
def test_folders_of_splits_are_recognised(names, tmp_path, capsys):
    train, validation, test = names
    make(tmp_path, f"{train}/cat", f"{train}/dog", f"{train}/emu", f"{validation}/cat", f"{test}/dog/2019", count=3)
    assert read(tmp_path) == {
        "train": {"cat": 3, "dog": 3, "emu": 3},
        "validation": {"cat": 3, "dog": 0, "emu": 0},
        "test": {"cat": 0, "dog": 3, "emu": 0},
    }
    assert "validation: 3 images in 1 class: cat (3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat", "train/dog", "unlabeled"], "'train', which looks like a split, beside 'unlabeled'"),
        (["train/cat", "train/dog", "test"], "'train', which looks like a split, and 'test/0.png', which then has no"),
        (["train/cat", "train/dog", "train/stray.png"], "and 'train/stray.png', which then has no class"),
        (["val/cat", "test/cat"], "'test', 'val', which look like splits, without 'train'"),
        (["train/cat", "val/cat", "dev/cat"], "several folders for one split: 'dev', 'train', 'val'"),
        (["0.png"], "with 1 image and no subfolders. Put the images of each class"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(names, message, tmp_path):
    with pytest.raises(SystemExit, match=f"`dataset` must .* but got .*{message}"):
        read(make(tmp_path, *names))


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    (tmp_path / "cats").mkdir()
    for number in range(3):
        (tmp_path / f"cats/{number}.heic").touch()
    with pytest.raises(SystemExit, match="with no images .3 files of other kinds: 3 .heic.."):
        read(tmp_path)


def test_classes_with_subfolders_and_what_is_left_out_are_reported(tmp_path, capsys):
    make(tmp_path, "cat/2019", "cat/2020", "dog", "cover.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog/notes.txt").touch()
    (tmp_path / "dog/.hidden.png").touch()
    assert read(tmp_path) == {"train": {"cat": 4, "dog": 2}}
    printed = capsys.readouterr().out
    assert "class cat has the images of its subfolders too: 2019, 2020" in printed
    assert "left out: 1 image in no class's folder: cover.png" in printed
    assert "left out: 1 file of other kinds: 1 .txt" in printed
    assert "left out: folders without images: empty" in printed


def test_a_folder_with_metadata_keeps_to_the_format_of_datasets(tmp_path):
    make(tmp_path, *[f"train_{n}.png" for n in range(3)], *[f"test_{n}.png" for n in range(3)])
    lines = [f"{file.name},{file.name[:2]}" for file in sorted(tmp_path.iterdir())]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
    assert len(image_folder.read_folder(tmp_path)["train"]) == 6
    with pytest.raises(SystemExit, match="one subfolder a class, but got .* with 'metadata.csv'. Remove that file"):
        read(make(tmp_path, "cat"))


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_any_path_will_do(kind, tmp_path, monkeypatch):
    folder = make(tmp_path / "we[i]rd *] dir?", "b[1]", "c*d", count=10)
    (folder / "a").symlink_to(make(tmp_path, "elsewhere", count=10) / "elsewhere")
    if kind == "parquet":
        image_folder.read_folder(folder)["train"].to_parquet(folder / "train[1].parquet")
        (folder / "train[1].parquet").rename(folder / "train.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in folder, "~/" + folder.name, os.path.relpath(folder):
        splits = load(path)
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 24, "validation": 3, "test": 3}
        assert splits["train"].features["label"].names == ["a", "b[1]", "c*d"]


def test_names_that_cannot_be_written_down_are_refused(tmp_path):
    make(tmp_path, "cat")
    os.rename(tmp_path / "cat/0.png", os.fsencode(tmp_path) + b"/cat/caf\xe9.png")
    with pytest.raises(SystemExit, match=r"`dataset` must have names of files in UTF-8, but got 'cat/caf.udce9.png'"):
        read(tmp_path)


def test_images_that_change_are_not_taken_from_a_cache(tmp_path):
    folder = make(tmp_path, "cat", "dog", count=1)
    first, again = (image_folder.read_folder(folder)["train"] for _ in range(2))
    assert first._fingerprint == again._fingerprint
    os.utime(folder / "cat/0.png", ns=(1, 1))
    assert image_folder.read_folder(folder)["train"]._fingerprint != first._fingerprint


# Images


def wide(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_columns_of_images_are_upright_and_of_8_bits(tmp_path):
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(grey).copy()).save(tmp_path / "turned.png", exif=exif)
    features = Features({"photo": ImageFeature(), "kind": Value("string")})
    rows = {"photo": [wide(grey.astype(np.uint16) * 257), str(tmp_path / "turned.png")], "kind": ["a", "b"]}
    rows = {name: values * 20 for name, values in rows.items()}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path, image_column="photo", label_column="kind")
    for split in splits.values():
        # What shuffles and selects rows keeps how their images are read.
        for row in split.shuffle(seed=1).select(range(2)):
            assert row["image"].mode == "RGB"
            assert np.array_equal(np.array(row["image"])[..., 0], grey)
    assert all(np.array_equal(np.array(image)[..., 2], grey) for image in splits["train"][:4]["image"])


def damage(folder, name, content):
    (folder / name).write_bytes(content)


def test_images_that_cannot_be_read_are_named_before_training(tmp_path):
    folder = make(tmp_path, "train/cat", "train/dog", "validation/cat", "test/dog", count=3)
    good = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(good, "JPEG")
    cut = good.getvalue()[:-500]
    bad = {"train/cat/0.png": b"", "train/dog/9.jpg": b"text", "validation/cat/7.jpg": cut}
    for name, content in bad.items():
        damage(folder, name, content)
    with pytest.raises(SystemExit, match="`dataset` must hold images that can be read, but got 3") as caught:
        load(folder)
    assert all(name in str(caught.value) for name in bad)
    for name in bad:
        (folder / name).unlink()
    # Pixels of training images are not decoded beforehand: the first epoch does it.
    damage(folder, "train/cat/cut.jpg", cut)
    with pytest.raises(ValueError, match=r"`images` must all be readable, but got '.*cut.jpg': .*truncated"):
        load(folder)["train"][:]


def test_a_missing_image_is_named(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [wide(np.zeros((4, 4), np.uint8)), None] * 20, "label": [0, 0, 1, 1] * 10}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit, match=r"image \d+ of train is missing \(null\): drop such rows first"):
        load(tmp_path)


def test_a_zip_must_be_unpacked(tmp_path):
    make(tmp_path / "images", "cat", "dog")
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    with pytest.raises(SystemExit, match="is a zip file: unpack it"):
        load(archive)


# Classes


def write_labels(folder, **labels):
    """Parquet files with one image for each label."""
    image().save(folder / "0.png")
    for split, values in labels.items():
        feature = values.pop() if isinstance(values[-1], ClassLabel) else None
        columns = {"image": [str(folder / "0.png")] * len(values), "label": values}
        rows = Dataset.from_dict(columns).cast_column("image", ImageFeature())
        (rows if feature is None else rows.cast_column("label", feature)).to_parquet(folder / f"{split}.parquet")
    return folder


def test_classes_are_numbered_over_all_splits(tmp_path, capsys):
    write_labels(tmp_path, train=["c", "a", "b", "c"], validation=["c", "a"], test=["b"])
    splits = load(tmp_path)
    assert {tuple(rows.features["label"].names) for rows in splits.values()} == {("a", "b", "c")}
    assert [list(rows["label"]) for rows in splits.values()] == [[2, 0, 1, 2], [2, 0], [1]]
    printed = capsys.readouterr().out
    assert "no images in 'validation' of 1 class: b" in printed
    assert "no images in 'test' of 2 classes: a, c" in printed


def test_numbers_are_classes_in_their_order(tmp_path):
    write_labels(tmp_path, train=[10, 9, 2], validation=[10])
    splits = load(tmp_path)
    assert splits["train"].features["label"].names == ["2", "9", "10"]
    assert list(splits["validation"]["label"]) == [2]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["a", "b"], ["c"], "`label` must be a class of the training images, but got others in 'validation': c"),
        (["a", None], ["a"], "`label` must be there for every image, but got none for some in 'train'"),
        ([0, 0, ClassLabel(names=["a", "b"])], [1, ClassLabel(names=["a", "b"])], "others in 'validation': b"),
        ([0, 1, ClassLabel(names=["a", "b"])], [1, ClassLabel(names=["a", "c"])], "others in 'validation': c"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(train, validation, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        load(write_labels(tmp_path, train=train, validation=validation))


@pytest.mark.parametrize("listed", [False, True], ids=["numbers", "class lists"])
def test_a_test_split_without_labels_is_left_out(listed, tmp_path, capsys):
    feature = [ClassLabel(names=["a", "b"])] if listed else []
    write_labels(tmp_path, train=[0, 1, *feature], validation=[1, *feature], test=[-1, -1, *feature])
    assert set(load(tmp_path)) == {"train", "validation"}
    assert "left out: splits without labels: test" in capsys.readouterr().out


CAFE, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_two_spellings_of_one_folder_are_one_class(tmp_path, capsys):
    make(tmp_path, f"train/{CAFE}", f"train/{DECOMPOSED}", "train/bar", f"test/{DECOMPOSED}")
    assert read(tmp_path) == {"train": {"bar": 2, CAFE: 4}, "test": {"bar": 0, CAFE: 2}}
    assert f"one class, though written in two forms of Unicode: {CAFE}" in capsys.readouterr().out


@pytest.mark.parametrize("listed", [False, True], ids=["strings", "class lists"])
def test_two_spellings_of_one_name_are_one_class(listed, tmp_path):
    train, validation = [CAFE, "bar"], [DECOMPOSED]
    if listed:
        train = [0, 1, ClassLabel(names=train)]
        validation = [0, ClassLabel(names=validation)]
    splits = load(write_labels(tmp_path, train=train, validation=validation))
    names = splits["train"].features["label"].names
    assert sorted(names) == ["bar", CAFE]
    assert names[splits["validation"]["label"][0]] == CAFE


def test_other_splits_are_left_out(tmp_path, capsys):
    write_labels(tmp_path, train=["a", "b"], validation=["a"], unsupervised=[None, None])
    assert set(load(tmp_path)) == {"train", "validation"}
    assert "left out: splits that are not train, validation or test: unsupervised" in capsys.readouterr().out


# The scripts around it


def test_predictions_read_what_training_reads(tmp_path, capsys):
    import predict

    folder = make(tmp_path / "[a] *", "cat", count=1)
    (folder / "dog").symlink_to(make(tmp_path, "elsewhere", count=1) / "elsewhere")
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "wide.png")
    Image.fromarray(grey.astype(np.float32)).save(folder / "unknown.tif")
    skipped = []
    images = dict(predict.read_images(predict.find_images(folder), False, skipped))
    assert [file.name for file in skipped] == ["unknown.tif"]
    assert [file.relative_to(folder).as_posix() for file in images] == ["cat/0.png", "dog/0.png", "wide.png"]
    assert np.array_equal(np.array(images[folder / "wide.png"])[..., 0], grey)
    assert "mode 'F' with values from 0 to 236" in capsys.readouterr().err


def test_a_run_does_not_go_on_from_a_checkpoint_without_the_optimizer(tmp_path):
    import train_image_classifier as script

    (tmp_path / "checkpoint-8").mkdir()
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        (tmp_path / "checkpoint-8" / name).write_text("{}")
    for named in ("true", str(tmp_path / "checkpoint-8")):
        arguments = script.Arguments(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint=named)
        with pytest.raises(SystemExit, match="with the optimizer's state.* but got '.*checkpoint-8'"):
            script.find_checkpoint(arguments)
    shutil.rmtree(tmp_path / "checkpoint-8")
