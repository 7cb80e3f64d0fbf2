"""The client: what it sends is what was trained; its files hold what they say, and nothing else is believed."""

import io
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from datasets import load_dataset
from huggingface_hub import ModelCard
from loopback_hub import loopback_hub
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, DeiTImageProcessor, ViTForImageClassification, ViTImageProcessor, pipeline

from pgn_peft import ImagePrompter, PGNConfig
from pgn_peft.prompter_card import make_prompter_card
from pgn_peft.training import start_library_from_images

ROOT = Path(__file__).parents[1]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)


def make(space="pixel", head="frozen", seed=1, **overrides):
    config = {"head": head, "num_virtual_tokens": None, "prompt_layout": "canvas" if space == "pixel" else "append"}
    if space == "pixel":
        config |= {"prompt_space": "pixel", "image_mean": MEAN, "image_std": STD}
    return move_adapter(get_peft_model(tiny_vit(), tiny_config(**(config | overrides))), seed).eval()


def photos(number=4):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40 + n, 50, 3), dtype=np.uint8)) for n in range(number)]


def same_images(one, other):
    return all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(one, other, strict=True))


FORMS = {
    "canvas": {},
    "append": {"prompt_layout": "append"},
    "static": {"generator": "static"},
    "no offset": {"image_offset": False},
    "small generator": {"generator_image_size": 16, "generator_norm": "group"},
    "latent in range": {"space": "latent"},
    "latent static in range": {"space": "latent", "generator": "static"},
}


def prompter_of(form, **options):
    model = make(**FORMS[form])
    return model, ImagePrompter.from_adapter(model, PROCESSOR, in_range="latent" in form, **options)


@pytest.mark.parametrize("form", ["canvas", "append", "static", "no offset", "small generator"])
def test_the_client_sends_what_was_trained(form):
    model, prompter = prompter_of(form)
    images = photos()
    expected = answer(model, PROCESSOR(images=images, return_tensors="pt")["pixel_values"])
    options = {"interpolate_pos_encoding": form == "append"}
    found = answer(tiny_vit(), prompter.pixel_values(images), **options)
    # A pixel that falls between two levels may be rounded up here and down there, and hardly any does.
    assert (found - expected).abs().max() < 0.01 * expected.std()
    served = PROCESSOR(images=prompter(images), return_tensors="pt", do_resize=form != "append")["pixel_values"]
    assert (answer(tiny_vit(), served, **options) - expected).abs().max() < 0.01 * expected.std()


def test_a_cropping_server_gets_a_margin_to_cut_off():
    processor = DeiTImageProcessor(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    )
    model = make()
    prompter = ImagePrompter.from_adapter(model, processor)
    images = photos()
    sent = prompter(images)
    assert sent[0].size == (40, 40)
    expected = answer(model, processor(images=images, return_tensors="pt")["pixel_values"])
    found = answer(tiny_vit(), processor(images=sent, return_tensors="pt")["pixel_values"])
    assert (found - expected).abs().max() < 0.01 * expected.std()
    classify = pipeline("image-classification", model=tiny_vit(), image_processor=processor)
    assert prompter.check_server(classify(prompter.probe())) < 1e-3


def test_every_kind_of_image_comes_back_as_it_came():
    _, prompter = prompter_of("canvas")
    image = photos()[0]
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = np.array(prompter(image))
    assert isinstance(prompter(image), Image.Image)
    assert isinstance(prompter([image]), list)
    assert np.array_equal(prompter(array), expected)
    assert prompter(np.stack([array, array])).shape == (2, 32, 32, 3)
    assert torch.equal(prompter(tensor), torch.from_numpy(expected).permute(2, 0, 1))
    assert torch.equal(prompter(tensor / 255), prompter(tensor))
    assert prompter(torch.stack([tensor] * 3)).shape == (3, 3, 32, 32)
    assert prompter([array, array]).shape == (2, 32, 32, 3)
    assert prompter(image.convert("RGBA")).mode == "RGB"
    assert prompter(image.convert("L")).mode == "RGB"
    with pytest.raises(ValueError, match="`images` must be one image at least, but got none"):
        prompter([])


def test_images_of_different_sizes_go_together_and_batches_do_not_mix():
    _, prompter = prompter_of("canvas")
    images = photos()
    assert same_images(prompter(images), [prompter(image) for image in images])


def test_one_channel():
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    config = tiny_config(
        prompt_space="pixel", image_mean=[0.5], image_std=[0.5], num_virtual_tokens=None, head="frozen"
    )
    prompter = ImagePrompter.from_adapter(get_peft_model(tiny_vit(num_channels=1), config), processor)
    assert prompter(photos()[0]).mode == "L"
    assert prompter.probe().mode == "L"


def test_making_it_leaves_the_model_as_it_was():
    model = make(head="trained").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prompter = ImagePrompter.from_adapter(model, PROCESSOR)
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not any(parameter.requires_grad for parameter in prompter.parameters())
    assert same_images(prompter(photos()), ImagePrompter.from_adapter(make(head="trained"), PROCESSOR)(photos()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": [0.5] * 3}, r"`image_mean` must be \[0.485.* as the adapter was trained with, but got \[0.5"),
        ({"size": {"height": 40, "width": 40}}, "`processor` must make images of 32 x 32 pixels, .* but got 40 x 40"),
        ({"size": {"shortest_edge": 32}}, "`processor` must make images of one size, but got one that resizes"),
    ],
)
def test_a_processor_that_was_not_trained_with_is_refused(change, message):
    processor = ViTImageProcessor(
        **({"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD} | change)
    )
    with pytest.raises(ValueError, match=message):
        ImagePrompter.from_adapter(make(), processor)


def test_what_has_no_such_adapter_is_refused():
    with pytest.raises(
        ValueError, match="`adapter_name` must be one of the model's adapters, default, but got 'other'"
    ):
        ImagePrompter.from_adapter(make(), PROCESSOR, "other")
    with pytest.raises(TypeError, match="`model` must carry a PGN adapter, but got ViTForImageClassification"):
        ImagePrompter.from_adapter(tiny_vit(), PROCESSOR)


# Files.


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_it_is_the_same(form, tmp_path):
    _, prompter = prompter_of(form)
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert same_images(loaded(photos()), prompter(photos()))
    assert (loaded.id2label, loaded.server_labels) == (prompter.id2label, prompter.server_labels)
    assert torch.equal(loaded.probe_scores, prompter.probe_scores)
    assert not loaded.training
    assert {path.name for path in tmp_path.iterdir()} == {"prompter.safetensors", "prompter_config.json"}


def test_exact_prompts_and_heads_are_saved_too(tmp_path):
    prompter = ImagePrompter.from_adapter(make("latent", head="trained", num_labels=3), PROCESSOR)
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert torch.equal(loaded.pixel_values(photos()), prompter.pixel_values(photos()))
    features = torch.randn(2, 32)
    assert torch.equal(loaded.classify(features), prompter.classify(features))


def edit(folder, change):
    file = folder / "prompter_config.json"
    config = json.loads(file.read_text()) | {"checksums": None}
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layout"].update(num_virtual_tokens=5), "`num_virtual_tokens` must fill"),
        (lambda c: c["layout"].update(num_virtual_tokens=10**9), "`num_virtual_tokens` must lie in"),
        (lambda c: c["layout"].update(name="below"), "`prompt_layout` must be one of"),
        (lambda c: c["layout"].update(patch_size=16), "must hold the tensors|must fill"),
        (lambda c: c["generator"].update(library_size=10**12), "`library_size` must lie in"),
        (lambda c: c["generator"].update(width=10**6), "`width` must lie in"),
        (lambda c: c["generator"].update(width=8), "must hold the tensors of .* but got others"),
        (lambda c: c["generator"].update(trunk="os.system"), "`trunk` must be one of resnet10, but got 'os.system'"),
        (lambda c: c["preprocessing"].update(image_std=[0, 1, 1]), "`image_std` must hold"),
        (lambda c: c["preprocessing"].update(size=[10**9, 10**9]), "`size` must lie in"),
        (lambda c: c["preprocessing"].update(size=None), "must be the configuration of a prompter|must measure"),
        (lambda c: c.update(in_range=False), "must hold the tensors of .* but got others"),
        (lambda c: c.update(image_offset=False), "must hold the tensors of .* but got others"),
        (lambda c: c.update(head=[10**9, 5]), "`head` must lie in"),
        (lambda c: c.update(label_mapping=[0, 1, 2, 3, 99]), "`label_mapping` must map"),
        (lambda c: c.update(label_mapping=[0, 0, 2, 3, 4]), "`label_mapping` must give"),
        (lambda c: c.pop("layout"), "must be the configuration of a prompter, but got KeyError"),
        (lambda c: c.update(layout=7), "must be the configuration of a prompter, but got TypeError"),
        (lambda c: c.update(server_labels=None), "must be the configuration of a prompter, but got TypeError"),
    ],
)
def test_a_configuration_that_was_tampered_with_is_refused(change, message, tmp_path):
    prompter_of("canvas")[1].save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises((ValueError, TypeError), match=message):
        ImagePrompter.from_pretrained(tmp_path)(photos())


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    prompter_of("canvas")[1].save_pretrained(tmp_path)
    file = tmp_path / "prompter.safetensors"
    tensors, whole = load_file(file), file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        ImagePrompter.from_pretrained(tmp_path)
    for name, tensor, message in [
        ("library", torch.full_like(tensors["library"], float("nan")), "library holds NaN or infinity"),
        ("library", tensors["library"].double(), "library as torch.float32, but got torch.float64"),
        ("library", tensors["library"][:-1], "library has the shape"),
        ("evil", torch.zeros(1), "evil is not part of it"),
    ]:
        save_file(tensors | {name: tensor.contiguous()}, file)
        with pytest.raises(ValueError, match=message):
            ImagePrompter.from_pretrained(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "prompter_config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="`prompter_config.json` must be a JSON object, but got"):
        ImagePrompter.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match="one without prompter.safetensors"):
        ImagePrompter.from_pretrained(tmp_path)
    with pytest.raises(
        OSError, match="must be an existing folder, or the id of a prompter on the Hub, but got neither"
    ):
        ImagePrompter.from_pretrained(tmp_path / "misspelt")


# Without PEFT and Transformers, and without torch.

CLIENT = """
import io, sys
sys.path.insert(0, sys.argv[2])
from PIL import Image
from pgn_peft.prompter import ImagePrompter
prompter = ImagePrompter.from_pretrained(sys.argv[1])
images = [Image.open(f"{sys.argv[1]}/{n}.png") for n in range(2)]
for n, image in enumerate(prompter(images)):
    image.save(f"{sys.argv[1]}/{n}-prompted.png")
prompter.save_pretrained(sys.argv[1] + "/again")
try:
    ImagePrompter.from_pretrained("someone/prompter")
except OSError as error:
    assert "pip install huggingface_hub" in str(error), error
else:
    raise SystemExit("a Hub id was loaded without huggingface_hub")
unwanted = {"peft", "transformers", "accelerate", "huggingface_hub", "datasets", "torchvision"} & set(sys.modules)
raise SystemExit(f"imported {unwanted}" if unwanted else 0)
"""


@pytest.mark.slow
def test_it_works_in_an_environment_of_torch_safetensors_numpy_and_pillow(tmp_path):
    """A new environment that sees these four (and what torch itself needs), as links into this one."""
    _, prompter = prompter_of("canvas")
    prompter.save_pretrained(tmp_path)
    for index, image in enumerate(photos(2)):
        image.save(tmp_path / f"{index}.png")
    venv.create(tmp_path / "environment", with_pip=False)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    wanted = {"torch", "torchgen", "functorch", "safetensors", "numpy", "numpy.libs", "PIL", "pillow.libs"}
    wanted |= {"typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}
    wanted |= {"nvidia", "triton", "cuda", "setuptools", "packaging"}
    for path in Path(torch.__file__).parents[1].iterdir():
        if path.name in wanted:
            (site / path.name).symlink_to(path)
    package = tmp_path / "package"
    package.mkdir()
    (package / "pgn_peft").symlink_to(ROOT / "pgn_peft")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(
        [tmp_path / "environment/bin/python", "-c", CLIENT, tmp_path, package],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert outcome.returncode == 0, outcome.stderr
    found = [Image.open(tmp_path / f"{index}-prompted.png") for index in range(2)]
    assert same_images(found, prompter(photos(2)))
    assert (tmp_path / "again/prompter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["canvas", "append", "static", "small generator", "latent in range"])
def test_onnx_gives_the_same_pixels_to_one_level(form, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, prompter = prompter_of(form)
    prompter.export_onnx(tmp_path / "prompter.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "prompter.onnx")
    for number in (1, 5):
        images = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8)
        (found,) = session.run(None, {"image": images.numpy()})
        expected = prompter(images)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected.numpy().astype(int)).max() <= 1
    with pytest.raises(ValueError, match="`prompter` must prompt with valid images to be exported"):
        ImagePrompter.from_adapter(make("latent"), PROCESSOR).export_onnx(tmp_path / "exact.onnx")


@pytest.mark.shared
@pytest.mark.slow
def test_png_through_the_stock_pipeline_on_real_images(shared):
    """An adapter of a few steps at full size: 8-bit PNGs get the answers of the adapted model."""
    checkpoint = shared / "models/deit-tiny-patch16-224"
    rows = load_dataset("parquet", data_files=str(shared / "data/eurosat/validation.parquet"), split="train[:40]")
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    mean, std = list(processor.image_mean), list(processor.image_std)
    torch.manual_seed(0)
    config = PGNConfig(
        prompt_space="pixel",
        library_size=32,
        generator_image_size=64,
        initial_logit_std=4,
        image_mean=mean,
        image_std=std,
        head="frozen",
        label_mapping=[970, 979, 839, 489],  # any will do
    )
    model = get_peft_model(ViTForImageClassification.from_pretrained(checkpoint), config)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in rows["image"][:]]) / 255
    start_library_from_images(model, pixels)
    pixel_values = processor(images=rows["image"][:], return_tensors="pt")["pixel_values"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        loss = model(pixel_values[:8], labels=torch.arange(8) % 4).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = answer(model.eval(), pixel_values).softmax(-1)
    prompter = ImagePrompter.from_adapter(model, processor)
    assert prompter.layout.num_virtual_tokens == 52
    classify = pipeline("image-classification", model=str(checkpoint))
    assert prompter.check_server(classify(prompter.probe())) < 1e-3
    sent = []
    for image in prompter(rows["image"][:]):
        file = io.BytesIO()
        image.save(file, "PNG")
        sent.append(Image.open(file).convert("RGB"))
    for scores, reply in zip(expected, classify(sent, top_k=1000), strict=True):
        found = {entry["label"]: entry["score"] for entry in prompter.answer(reply)}
        for index, label in prompter.id2label.items():
            assert found[label] == pytest.approx(scores[index].item(), abs=0.03)


@pytest.mark.parametrize(("form", "word"), [("canvas", "top_k=5"), ("append", "check_server"), ("latent", "tensors")])
def test_the_card_says_how_to_use_it(form, word):
    prompter = prompter_of(form)[1] if form in FORMS else ImagePrompter.from_adapter(make(form), PROCESSOR)
    card = make_prompter_card(prompter, "someone/prompter")
    assert ModelCard(str(card)).data.library_name == "pgn-peft"
    code = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    compile(code, "card", "exec")
    assert 'from_pretrained("someone/prompter")' in code
    assert word in code
    assert "booktitle = {British Machine Vision Conference}" in card.text


# The Hub: the client's address is fixed when huggingface_hub is imported, hence new processes.

PUSH = """
import sys
from pgn_peft.prompter import ImagePrompter
print(ImagePrompter.from_pretrained(sys.argv[1]).push_to_hub("someone/prompter", private=True))
"""
PULL = """
import sys
from pgn_peft.prompter import ImagePrompter
ImagePrompter.from_pretrained("someone/prompter").save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_pushed_to_a_hub_and_loaded_from_it(tmp_path):
    _, prompter = prompter_of("canvas")
    prompter.save_pretrained(tmp_path / "local")
    with loopback_hub(token="hf_secret") as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}

        def run(code, folder, token):
            secret = {} if token is None else {"HF_TOKEN": token}
            return subprocess.run(
                [sys.executable, "-c", code, folder],
                capture_output=True,
                text=True,
                env=environment | secret,
                timeout=100,
            )

        refused = run(PUSH, tmp_path / "local", None)
        assert refused.returncode == 1
        assert "401" in refused.stderr
        assert not hub.repositories
        pushed = run(PUSH, tmp_path / "local", "hf_secret")
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == "someone/prompter"
        files = {"prompter.safetensors", "prompter_config.json", "README.md"}
        assert set(hub.repositories["someone/prompter"]) == files
        pulled = run(PULL, tmp_path / "pulled", "hf_secret")
        assert pulled.returncode == 0, pulled.stderr
    assert same_images(ImagePrompter.from_pretrained(tmp_path / "pulled")(photos()), prompter(photos()))
