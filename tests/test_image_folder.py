"""Folders of images as the training script reads them: classes, splits, class numbers, images that cannot be read."""

import io
import os
import pickle
import shutil
from pathlib import Path

import datasets
import image_data
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessor

PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


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
        for split, rows in image_data.read_folder(folder).items()
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
    assert "validation: 3 images in 1 classes: cat (3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        ("training_set/cat", "training_set/dog", "test_set/cat"),
        ("seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/seg_test/cat"),
        ("cat/train", "dog/train", "cat/test"),
    ],
)
def test_splits_of_other_names_and_places_are_recognised(names, tmp_path):
    assert read(make(tmp_path, *names)) == {"train": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 0}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat", "train/dog", "unlabeled"], "'train' looks like a split, and 'unlabeled' beside it does not"),
        (["train/cat", "train/dog", "test"], "'train' looks like a split, and 'test/0.png' has no class then"),
        (["val/cat", "test/cat"], "there is no 'train' beside test, val"),
        (["train/cat", "val/cat", "dev/cat"], "several folders for one split: dev, train, val"),
        (["0.png"], "There are 1 images, in no subfolder. Put the images of each class"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(make(tmp_path, *names))


def test_a_folder_that_holds_all_others_does_not_count(tmp_path):
    assert read(make(tmp_path, "pets/cat", "pets/dog/2019")) == {"train": {"cat": 2, "dog": 2}}


def test_classes_with_subfolders_and_what_is_left_out_are_reported(tmp_path, capsys):
    make(tmp_path, "cat/2019", "cat/2020", "dog", "cover.png")
    (tmp_path / "dog/notes.txt").touch()
    (tmp_path / "dog/.hidden.png").touch()
    assert read(tmp_path) == {"train": {"cat": 4, "dog": 2}}
    printed = capsys.readouterr().out
    assert "left out: images in no class's folder: cover.png" in printed
    assert "left out: files of other kinds: .txt" in printed


def test_a_folder_with_metadata_keeps_to_the_format_of_datasets(tmp_path):
    make(tmp_path, *[f"train_{n}.png" for n in range(3)], *[f"test_{n}.png" for n in range(3)])
    lines = [f"{file.name},{file.name[:2]}" for file in sorted(tmp_path.iterdir())]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,kind", *lines]))
    assert len(image_data.read_folder(tmp_path)["train"]) == 6


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_any_path_will_do(kind, tmp_path, monkeypatch):
    folder = make(tmp_path / "we[i]rd *] dir?", "b[1]", "c*d", count=10)
    (folder / "a").symlink_to(make(tmp_path, "elsewhere", count=10) / "elsewhere")
    if kind == "parquet":
        image_data.read_folder(folder)["train"].to_parquet(folder / "train[1].parquet")
        (folder / "train[1].parquet").rename(folder / "train.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in folder, "~/" + folder.name, os.path.relpath(folder):
        splits = load(path)
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 24, "validation": 3, "test": 3}
        assert splits["train"].features["label"].names == ["a", "b[1]", "c*d"]


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
    with pytest.raises(ValueError, match="3 images cannot be read") as caught:
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
    with pytest.raises(ValueError, match=r"image \d+ of train is missing \(null\): drop such rows first"):
        load(tmp_path)


def test_a_zip_must_be_unpacked(tmp_path):
    make(tmp_path / "images", "cat", "dog")
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    with pytest.raises(ValueError, match="is a zip file: unpack it"):
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
    assert "no images in 'validation' of: b" in printed
    assert "no images in 'test' of: a, c" in printed


def test_numbers_are_classes_in_their_order(tmp_path):
    write_labels(tmp_path, train=[10, 9, 2], validation=[10])
    splits = load(tmp_path)
    assert splits["train"].features["label"].names == ["2", "9", "10"]
    assert list(splits["validation"]["label"]) == [2]


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["a", "b"], ["c"], "'validation' has images of classes that 'train' has none of: c"),
        (["a", None], ["a"], "Some images of 'train' have no label"),
        ([0, 0, ClassLabel(names=["a", "b"])], [1, ClassLabel(names=["a", "b"])], "'train' has none of: b"),
        ([0, 1, ClassLabel(names=["a", "b"])], [1, ClassLabel(names=["a", "c"])], "'train' has none of: c"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(train, validation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
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


# From images to batches


def numbered(count=40):
    """Images of noise of various sizes, of two classes."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, size=(36 + n % 5, 40 + n % 7, 3), dtype=np.uint8) for n in range(count)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["blue", "red"])})
    rows = {"image": [Image.fromarray(pixels) for pixels in images], "label": [n % 2 for n in range(count)]}
    return Dataset.from_dict(rows, features=features)


def test_training_images_are_augmented_each_time_and_others_never(tmp_path):
    numbered().to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path)
    plain = image_data.add_transforms(splits, PROCESSOR, "official")
    torch.manual_seed(0)
    train = [splits["train"][:8]["pixel_values"] for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*[splits["validation"][:]["pixel_values"] for _ in range(2)])
    unchanged = plain[:8]["pixel_values"]
    assert sum(torch.equal(*pair) for pair in zip(train[0], unchanged, strict=True)) < 4
    image = splits["train"].with_format(None)[0]["image"]
    assert torch.equal(unchanged[0], PROCESSOR(images=image, return_tensors="pt")["pixel_values"][0])
    # macOS and Windows send rows to a loader's workers as pickles.
    assert pickle.loads(pickle.dumps(splits["train"]))[0]["pixel_values"].shape == (3, 32, 32)


@pytest.mark.parametrize("number", [2, 31])
def test_any_number_of_images_has_the_same_share_of_each_class(number):
    rows = numbered().filter(lambda row, place: row["label"] == 1 or place % 4 == 0, with_indices=True)
    counts = np.bincount(np.array(rows["label"])[image_data.spread(rows, seed=0)[:number]])
    wanted = number * np.bincount(rows["label"]) / len(rows)
    assert np.abs(counts - wanted).max() <= 1
    assert counts.min() >= 1


def test_lists_of_labels_become_several_labels_of_an_image(tmp_path):
    rows = numbered().remove_columns("label").add_column("tags", [["sea", "boat"], [], ["boat"], ["sea"]] * 10)
    rows.to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path, label_column="tags")
    assert splits["train"].features["label"] == List(ClassLabel(names=["boat", "sea"]))
    image_data.add_transforms(splits, PROCESSOR)
    labels = np.concatenate([splits[split][:]["labels"] for split in splits])
    assert labels.sum(axis=0).tolist() == [20, 20]
    assert len(labels) == 40
