"""From files to batches in the training script: streams, the cache of resized images, augmentation, workers."""

import collections
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import types

import datasets
import image_data
import image_device
import image_loading
import image_stream
import image_transforms
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import ENVIRONMENT, HANG, ROOT, tiny_vit
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as reference
from transformers import CLIPImageProcessor, DeiTImageProcessor, ViTImageProcessor

from pgn_peft import ImageCollator

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
def test_cached_images_give_the_same_pixel_values_to_the_last_bit(name, rows):
    processor = PROCESSORS[name]
    cached = image_transforms.cache_images(rows, processor)
    for splits in rows, cached:
        image_transforms.add_transforms(splits, processor, "none")
    for split in "train", "validation":
        assert torch.equal(cached[split][:]["pixel_values"], rows[split][:]["pixel_values"])
        assert cached[split][:]["labels"] == rows[split][:]["labels"]
    single = processor(images=rows["train"].with_format(None)[7]["image"], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(cached["train"][7]["pixel_values"], single)


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
    assert torch.equal(cached["train"][:]["pixel_values"], rows["train"][:]["pixel_values"])


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
    assert torch.equal(*[rows["validation"][:]["pixel_values"] for _ in range(2)])
    unchanged = rows["train"].with_transform(plain)[:8]["pixel_values"]
    assert sum(torch.equal(*pair) for pair in zip(train[0], unchanged, strict=True)) < 4


# Streams


def options(tmp_path, **more):
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "max_steps": 100, "eval_strategy": "epoch"}
    return image_loading.LoaderArguments(**(arguments | {"save_strategy": "epoch"} | more))


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        (
            {},
            {"max_steps": -1},
            "`max_steps` must be given with --streaming true, since .* but got -1. Add --max_steps",
        ),
        ({"cache_images": True}, {}, "`cache_images` must be false with --streaming true, but got true"),
        ({"max_train_samples": 9}, {}, "`max_train_samples` must be left out with --streaming true, but got 9"),
        ({"shuffle_buffer": 0}, {}, "`shuffle_buffer` must be 1 at least, but got 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_any_work(tmp_path, data, training, message):
    wanted = image_data.DataArguments("nowhere", streaming=True, **data)
    with pytest.raises(SystemExit, match=message):
        image_stream.prepare_streaming(wanted, options(tmp_path, **training))


def test_a_stream_is_evaluated_and_saved_by_steps(tmp_path):
    stream = image_data.DataArguments("nowhere", streaming=True)
    for given, every in ({}, 10), ({"max_steps": 3}, 1):
        arguments = options(tmp_path, **given)
        image_stream.prepare_streaming(stream, arguments)
        assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", every)
        assert (arguments.save_strategy, arguments.save_steps) == ("steps", every)
        assert arguments.accelerator_config.dispatch_batches is False
    chosen = {"eval_strategy": "steps", "eval_steps": 7, "save_strategy": "no"}
    arguments = options(tmp_path, **chosen, accelerator_config={"dispatch_batches": True})
    image_stream.prepare_streaming(stream, arguments)
    assert (arguments.eval_steps, arguments.save_strategy) == (7, "no")
    assert arguments.accelerator_config.dispatch_batches is True
    arguments = options(tmp_path)
    image_stream.prepare_streaming(image_data.DataArguments("nowhere"), arguments)
    assert arguments.eval_strategy == "epoch"


def load(source, buffer=5, seed=0, **more):
    data = image_data.DataArguments(str(source), streaming=True, shuffle_buffer=buffer, **more)
    return image_stream.load_images(data, seed=0, shuffle_seed=seed)


def test_a_stream_is_endless_shuffled_and_the_same_for_the_same_seed(folder):
    splits = load(folder)
    assert isinstance(splits["train"], IterableDataset)
    assert splits["train"].num_shards == 4
    assert splits["train"].features["label"].names == ["blue", "red"]
    assert [numbers([row]) for row in load(folder, seed=0)["train"].take(50)] == [
        numbers([row]) for row in splits["train"].take(50)
    ]
    # A buffer of five holds back no more than five images of a pass, and so do the next two passes.
    passes = numbers(splits["train"].take(120))
    assert len(set(passes[:40])) >= 35
    assert all(count in (2, 3, 4) for count in collections.Counter(passes).values())
    assert passes[:40] != sorted(passes[:40])
    assert numbers(load(folder, seed=1)["train"].take(40)) != passes[:40]
    assert len(splits["validation"]) == 8


def test_a_folder_of_images_is_streamed_in_mixed_order_and_split(tmp_path, monkeypatch):
    for index, row in enumerate(pictures(60)):
        name = FEATURES["label"].names[row["label"]]
        (tmp_path / name).mkdir(exist_ok=True)
        row["image"].save(tmp_path / name / f"{index}.png")
    splits = load(tmp_path, buffer=1)
    assert [len(splits[name]) for name in ("validation", "test")] == [6, 6]
    labels = [row["label"] for row in splits["train"].take(48)]
    assert {labels.count(0), labels.count(1)} == {24}
    assert 4 < sum(labels[:24]) < 20  # the folder has all of one class first
    assert len(set(numbers(splits["train"].take(48)))) == 48
    assert splits["train"].num_shards > 1
    # With splits of its own nothing has mixed the images before, and in one piece nothing else does.
    cut = tmp_path / "cut"
    for name in "blue", "red":
        shutil.copytree(tmp_path / name, cut / "train" / name)
        shutil.copytree(tmp_path / name, cut / "validation" / name)
    monkeypatch.setattr(image_stream, "FOLDER_SHARDS", 1)
    assert 4 < sum(row["label"] for row in load(cut, buffer=1)["train"].take(30)) < 26


def test_an_id_on_the_hub_is_streamed_and_its_validation_images_are_kept(folder, monkeypatch, tmp_path):
    opened = []

    def load_dataset(source, configuration, streaming):
        opened.append((source, configuration, streaming))
        return IterableDatasetDict(
            {
                name: image_data.read_parquet(files, streaming=True)
                .rename_column("image", "img")
                .rename_column("label", "fine_label")
                for name, files in image_data.find_parquet(str(folder)).items()
            }
        )

    monkeypatch.setattr(image_data, "read_source", load_dataset)
    monkeypatch.setattr(image_stream, "read_source", load_dataset)
    monkeypatch.chdir(tmp_path)
    splits = load("cifar100")
    assert opened == [("uoft-cs/cifar100", None, True)]
    assert len(splits["validation"]) == 8
    assert splits["validation"][3]["image"].mode == "RGB"
    assert numbers(splits["train"].take(3))


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (
            ["train", "test"],
            None,
            "must have a split 'validation' with --streaming true.*with test.*leave --streaming",
        ),
        (["validation"], None, "`dataset` must have a split 'train'"),
        (["train", "validation"], Value("string"), "`label_column` must have named classes .* but got Value"),
        (["train", "validation"], ClassLabel(names=["red", "blue"]), "same classes in all splits.*'validation'"),
    ],
)
def test_sources_that_cannot_be_streamed_say_what_is_missing(tmp_path, files, labels, message):
    for name in files:
        rows = pictures(4)
        if labels is not None and (name == "train" or isinstance(labels, Value)):
            rows = rows.cast_column("label", labels)
        rows.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(SystemExit, match=message):
        load(tmp_path)


def test_the_row_groups_of_a_single_file_are_divided_as_files_are(folder, tmp_path):
    pictures(40).to_parquet(tmp_path / "train.parquet", batch_size=8)
    shutil.copy(folder / "validation.parquet", tmp_path)
    assert load(tmp_path)["train"].num_shards == 5


@pytest.mark.parametrize("shards", [1, 4])
def test_two_processes_share_a_stream(folder, tmp_path, shards):
    """With a piece for each process, or a single piece for both, which Accelerate cuts by batches."""
    if shards == 1:
        pictures(40).to_parquet(tmp_path / "train.parquet")
        shutil.copy(folder / "validation.parquet", tmp_path)
        folder = tmp_path
    shares = []
    for process in range(2):
        loader = DataLoader(load(folder)["train"], batch_size=5, collate_fn=numbers)
        loader = prepare_data_loader(
            loader, num_processes=2, process_index=process, put_on_device=False, dispatch_batches=False
        )
        shares.append(list(itertools.chain(*itertools.islice(loader, 3))))
    assert [len(set(share)) for share in shares] == [15, 15]
    assert set(shares[0]).isdisjoint(shares[1])


def collator(augmentation="official", **more):
    transform = image_transforms.Transform(PROCESSOR, augmentation)
    return image_stream.StreamCollator(transform, ImageCollator(2), seed=0, **more)


def test_encoded_images_are_decoded_and_augmented_by_the_number_of_their_batch(folder):
    examples = list(load(folder)["train"].take(6))
    state = torch.random.get_rng_state()
    first, again = collator(), collator()
    batches = [first(examples)["pixel_values"] for _ in range(3)]
    assert torch.equal(torch.random.get_rng_state(), state)  # the model's random numbers are its own
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], collator(process=1)(examples)["pixel_values"])
    torch.manual_seed(99)
    assert all(torch.equal(again(examples)["pixel_values"], batch) for batch in batches)
    plain = collator("none")(examples)
    images = [ImageFeature(mode="RGB").decode_example(example["image"]) for example in examples]
    assert torch.equal(plain["pixel_values"], PROCESSOR(images=images, return_tensors="pt")["pixel_values"])
    assert plain["labels"].tolist() == [example["label"] for example in examples]
    ready = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 1}]
    assert collator()(ready)["labels"].tolist() == [1]


def test_workers_that_start_afresh_get_what_they_need(rows, folder):
    """macOS and Windows send it to them as pickles."""
    image_transforms.add_transforms(rows, PROCESSOR, "official")
    sent = pickle.loads(pickle.dumps(rows["train"]))
    assert sent[0]["pixel_values"].shape == (3, 32, 32)
    stream, collate = pickle.loads(pickle.dumps((load(folder)["train"], collator())))
    assert collate(list(stream.take(2)))["pixel_values"].shape == (2, 3, 32, 32)


# Augmentation on the device


def test_each_change_of_colour_is_torchvisions():
    pixels = torch.rand(6, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    pixels[0] = pixels[0, :1]  # grey, where hue has no meaning
    factors = torch.tensor([[0.6, 1.4, 0.7, -0.1], [1.3, 0.6, 1.4, 0.1]]).repeat(3, 1)
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2], [-1] * 4, [0, 3, 1, 2]])
    changes = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    changed = image_device.jitter(pixels, factors, order)
    for index, image in enumerate(pixels):
        for change in order[index].tolist():
            image = image if change < 0 else changes[change](image, factors[index, change].item())
        torch.testing.assert_close(changed[index], image, atol=1e-4, rtol=0)


def test_each_image_of_a_batch_is_augmented_in_its_own_way():
    torch.manual_seed(0)
    image = torch.rand(3, 8, 8)
    batch = image_device.augment(image.expand(400, -1, -1, -1), "official")
    assert batch.min() >= 0
    assert batch.max() <= 1
    assert len({tuple(changed.flatten().tolist()) for changed in batch}) > 300
    gray = ((batch.amax(1) - batch.amin(1)).amax((1, 2)) < 1e-6).float().mean()
    assert 0.13 < gray < 0.27
    flipped = image_device.augment(image.expand(400, -1, -1, -1), "flip")
    as_it_was = torch.tensor([torch.equal(changed, image) for changed in flipped])
    assert torch.equal(flipped[~as_it_was], image.flip(-1).expand(int((~as_it_was).sum()), -1, -1, -1))
    assert 0.4 < as_it_was.float().mean() < 0.6
    factors, order = image_device.draw_jitter(2000)
    assert torch.allclose(factors.amin(0), torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=0.01)
    assert torch.allclose(factors.amax(0), torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=0.01)
    assert 0.76 < (order[:, 0] >= 0).float().mean() < 0.84
    assert len({tuple(row) for row in order.tolist()}) == 25


def test_the_device_augments_in_training_only():
    seen = []
    model = tiny_vit()
    augmentation = image_device.DeviceAugmentation("flip", [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    augmentation.attach(model)
    model.vit.embeddings.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    pixel_values = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-0.7, 1)
    model.eval()(pixel_values=pixel_values)
    assert torch.equal(seen[0], pixel_values)
    torch.manual_seed(0)
    model.train()(pixel_values=pixel_values)
    both = [pixel_values, pixel_values.flip(-1)]
    chosen = [[torch.allclose(a, b, atol=1e-6) for a, b in zip(seen[1], way, strict=True)] for way in both]
    assert all(a != b for a, b in zip(*chosen, strict=True))
    assert 0 < sum(chosen[0]) < 8


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
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_reaches_the_weights_of_an_uninterrupted_one(command, tmp_path, workers):
    options = f"--streaming true --shuffle_buffer 8 --max_steps 18 --dataloader_num_workers {workers}"
    options += " --eval_steps 3 --save_steps 3 --eval_strategy steps --save_strategy steps --save_total_limit 9"
    options += " --load_best_model_at_end false"
    results, expected = train(command, tmp_path / "whole", options)
    assert results["train_images"] == 72
    # As after a crash between the steps 12 and 15, in the second pass over the 40 images.
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in [*cut.glob("checkpoint-1[58]"), cut / "adapter_model.safetensors"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, resumed = train(command, cut, options, "--resume_from_checkpoint true")
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), f"{name} differs after resuming"


@pytest.mark.slow
def test_an_adapter_that_looks_at_images_first_starts_from_a_stream(command, tmp_path):
    options = "--streaming true --max_steps 2 --prompt_space pixel --head frozen --label_mapping true"
    _, weights = train(command, tmp_path / "adapter", options, "--num_virtual_tokens 12 --augment_on device")
    assert any("patch_logits" in name for name in weights)


@pytest.mark.slow
def test_cached_images_train_to_the_same_weights(command, tmp_path):
    options = "--num_train_epochs 1 --augmentation none"
    _, expected = train(command, tmp_path / "plain", options)
    _, cached = train(command, tmp_path / "cached", options, "--cache_images true")
    assert all(torch.equal(cached[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_processes_train_on_a_stream(command, tmp_path):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        f"""
import os, sys
sys.path[:0] = [{str(ROOT / "examples")!r}, {str(ROOT / "tests")!r}]
import datasets, image_stream, train_image_classifier
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.5
from test_data_path import numbers
seen, collate = [], image_stream.StreamCollator.__call__
def remember(self, examples):
    seen.extend(numbers(examples) if "image" in examples[0] else ())
    return collate(self, examples)
image_stream.StreamCollator.__call__ = remember
train_image_classifier.main(sys.argv[1:])
# A file for each process: lines that two print at once into one pipe run into each other.
with open({str(tmp_path)!r} + "/seen-" + os.environ["RANK"], "w") as file:
    file.write(" ".join(map(str, seen[:16])))
""",
        encoding="utf-8",
    )
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"  # 0: one that is free
    options = f"--output_dir {tmp_path / 'adapter'} --streaming true --max_steps 4 --shuffle_buffer 8"
    words = [sys.executable, *launch.split(), str(wrapper), *command, *options.split()]
    subprocess.run(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True, timeout=HANG)
    shares = [set((tmp_path / f"seen-{rank}").read_text(encoding="utf-8").split()) for rank in range(2)]
    assert [len(share) for share in shares] == [16, 16]
    assert shares[0].isdisjoint(shares[1])
    assert "training images" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
