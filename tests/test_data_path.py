"""From files to batches in the training script: streams, the cache of resized images, augmentation, workers."""

import os
import pickle
import types

import datasets
import image_data
import image_loading
import image_transforms
import numpy as np
import pytest
import torch
from conftest import assert_same, tiny_vit
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, DeiTImageProcessor, ViTImageProcessor

FEATURES = Features({"image": ImageFeature(), "label": ClassLabel(names=["blue", "red"])})
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def pictures(count, seed=0):
    """Images of noise, mostly blue (label 0) or red (1), of various sizes; the one in the corner is its number."""
    random = np.random.default_rng(seed)
    rows = {"image": [], "label": []}
    for index in range(count):
        label = index % 2
        pixels = random.integers(0, 120, size=(36 + index % 5, 40 + index % 7, 3), dtype=np.uint8)
        pixels[..., 0 if label else 2] += 120
        pixels[0, 0] = (index, index, index)
        rows["image"].append(Image.fromarray(pixels))
        rows["label"].append(label)
    return Dataset.from_dict(rows, features=FEATURES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own, so that nothing stays behind, or is found that another run left."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        # Whenever a stream of parquet files is closed, datasets waits five seconds for pyarrow's threads.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parquet files: 40 training images in four pieces, 8 for validation."""
    folder = tmp_path_factory.mktemp("parquet")
    rows = pictures(40)
    for index in range(4):
        rows.shard(4, index).to_parquet(folder / f"train-{index:05}-of-00004.parquet")
    pictures(8, seed=1).to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture
def rows(folder):
    return image_data.load_splits(image_data.DataArguments(str(folder)), seed=0)


def numbers(examples):
    """The numbers of encoded examples, read off their corners."""
    return [
        np.array(ImageFeature(mode="RGB").decode_example(example["image"]))[0, 0, 0].item() for example in examples
    ]


# The cache of resized images


PROCESSORS = {
    "ViT": PROCESSOR,
    "DeiT": DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    "CLIP": CLIPImageProcessor(size={"shortest_edge": 33}, crop_size={"height": 32, "width": 32}),
    "bilinear": ViTImageProcessor(size={"height": 24, "width": 30}, resample=2),
    "enlarged": ViTImageProcessor(size={"height": 64, "width": 64}, resample=3),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_cached_images_give_the_same_pixel_values(name, rows):
    processor = PROCESSORS[name]
    cached = image_transforms.cache_images(rows, processor)
    for splits in rows, cached:
        image_transforms.add_transforms(splits, processor, "none")
    for split in "train", "validation":
        assert_same(cached[split][:]["pixel_values"], rows[split][:]["pixel_values"])
        assert cached[split][:]["labels"] == rows[split][:]["labels"]
    single = processor(images=rows["train"].with_format(None)[7]["image"], return_tensors="pt")["pixel_values"][0]
    assert_same(cached["train"][7]["pixel_values"], single)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["flowers17", "eurosat"])
def test_cached_images_are_the_same_for_a_real_processor_and_real_photos(shared, name, tmp_path):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(shared / "models/deit-tiny-patch16-224")
    files = {"train": str(shared / f"data/{name}/validation.parquet")}
    rows = image_data.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))["train"].select(range(12))
    rows = DatasetDict(train=rows.cast_column("image", ImageFeature(mode="RGB")))
    cached = image_transforms.cache_images(rows, processor)
    for splits in rows, cached:
        image_transforms.add_transforms(splits, processor, "none")
    assert_same(cached["train"][:]["pixel_values"], rows["train"][:]["pixel_values"])


def cache_files(splits):
    return {file["filename"] for file in splits["train"].cache_files}


def test_a_cache_is_found_again_and_none_is_taken_for_another(rows, folder, monkeypatch):
    first = cache_files(image_transforms.cache_images(rows, PROCESSOR))
    assert first
    other_scale = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3)
    others = [
        PROCESSORS["DeiT"],
        PROCESSORS["bilinear"],
        ViTImageProcessor(size={"height": 32, "width": 32}, resample=3),
    ]
    for other in others:
        assert cache_files(image_transforms.cache_images(rows, other)).isdisjoint(first)
    resized = []
    monkeypatch.setattr(image_transforms, "to_pixels", lambda *a: resized.append(a))
    again = image_data.load_splits(image_data.DataArguments(str(folder)), seed=0)
    assert cache_files(image_transforms.cache_images(again, other_scale)) == first
    assert not resized


def test_processors_whose_images_cannot_be_cached_are_refused(rows):
    with pytest.raises(SystemExit, match="`cache_images` must be false .* leaves images of different sizes"):
        image_transforms.cache_images(rows, CLIPImageProcessor(do_center_crop=False))
    with pytest.raises(SystemExit, match="`cache_images` must be false .* `do_normalize` must be True"):
        image_transforms.cache_images(rows, ViTImageProcessor(do_normalize=False))

    class Mirroring(ViTImageProcessor):
        def resize(self, *args, **kwargs):
            return super().resize(*args, **kwargs).flip(-1)

    with pytest.raises(SystemExit, match="`cache_images` must be false for Mirroring"):
        image_transforms.cache_images(rows, Mirroring(size={"height": 32, "width": 32}))


@pytest.mark.parametrize("cached", [False, True])
def test_training_images_are_augmented_each_time_and_others_never(rows, cached):
    if cached:
        rows = image_transforms.cache_images(rows, PROCESSOR)
    plain = image_transforms.add_transforms(rows, PROCESSOR, "official")
    torch.manual_seed(0)
    train = [rows["train"][:8]["pixel_values"] for _ in range(2)]
    assert not torch.equal(*train)
    assert_same(*[rows["validation"][:]["pixel_values"] for _ in range(2)])
    unchanged = rows["train"].with_transform(plain)[:8]["pixel_values"]
    assert sum(torch.allclose(*pair) for pair in zip(train[0], unchanged, strict=True)) < 4


def test_workers_that_start_afresh_get_what_they_need(rows):
    """macOS and Windows send it to them as pickles."""
    image_transforms.add_transforms(rows, PROCESSOR, "official")
    sent = pickle.loads(pickle.dumps(rows["train"]))
    assert sent[0]["pixel_values"].shape == (3, 32, 32)


# Workers


@pytest.mark.parametrize(
    ("cores", "processes", "platform", "workers"),
    [(2, 1, "linux", 1), (16, 1, "linux", 8), (16, 4, "linux", 3), (2, 4, "linux", 1), (16, 1, "darwin", 4)],
)
def test_the_loader_gets_the_cores_that_a_process_has(monkeypatch, cores, processes, platform, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(image_loading, "sys", types.SimpleNamespace(platform=platform))
    assert image_loading.default_workers(accelerated=True) == workers
    assert image_loading.default_workers(accelerated=False) == 0


def options(tmp_path, **more):
    import train_image_classifier

    return train_image_classifier.Arguments(str(tmp_path), **({"use_cpu": True} | more))


def test_what_is_asked_of_the_loader_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = options(tmp_path, use_cpu=False)
    assert (arguments.dataloader_num_workers, arguments.dataloader_persistent_workers) == (0, False)
    assert arguments.dataloader_pin_memory is False  # torch would warn
    arguments = options(tmp_path, dataloader_num_workers=2)
    assert (arguments.dataloader_num_workers, arguments.dataloader_persistent_workers) == (2, True)
    arguments = options(tmp_path, dataloader_num_workers=2, dataloader_persistent_workers=False)
    assert arguments.dataloader_persistent_workers is False


# The script


@pytest.fixture(scope="module")
def command(folder, tmp_path_factory):
    model = tmp_path_factory.mktemp("vit")
    tiny_vit(num_labels=2).save_pretrained(model)
    PROCESSOR.save_pretrained(model)
    words = f"--model_name_or_path {model} --dataset {folder} --library_size 4 --num_virtual_tokens 2 "
    words += "--generator_width 4 --per_device_train_batch_size 4 --use_cpu --disable_tqdm true"
    return words.split()


def train(command, output, *more):
    import train_image_classifier

    results = train_image_classifier.main([*command, "--output_dir", str(output), *" ".join(more).split()])
    return results, load_file(output / "adapter_model.safetensors")


@pytest.mark.slow
def test_cached_images_train_to_the_same_weights(command, tmp_path):
    options = "--num_train_epochs 1 --augmentation none"
    _, expected = train(command, tmp_path / "plain", options)
    _, cached = train(command, tmp_path / "cached", options, "--cache_images true")
    assert_same(cached, expected, tolerance=1e-3)
