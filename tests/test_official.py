"""Import of released networks, on small ones written as the official code writes them."""

import collections
import os
import pickle

import pytest
import torch
from conftest import answer, assert_nearly_equal, tiny_vit
from peft import PeftModel

from pgn_peft import official
from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import TokenLibrary


@pytest.fixture
def network():
    """Three prompts out of six tokens of width 32, with statistics that show when they are lost."""
    torch.manual_seed(0)
    generator, library = PromptGenerator(3, 6, width=4), TokenLibrary(6, 32, initializer_range=1.0)
    generator.train()(torch.randn(8, 3, 32, 32))
    return official.OfficialNetwork(generator.eval(), library)


@pytest.fixture
def file(network, tmp_path):
    torch.save(collections.OrderedDict(official.state_dict(network)), tmp_path / "network.pt")
    return tmp_path / "network.pt"


def test_names_are_the_official_ones(network):
    names = set(official.state_dict(network))
    assert names >= {
        "tl_vectors",
        "model.input_net.0.weight",
        "model.input_net.1.running_var",
        "model.blocks.0.net.0.weight",
        "model.blocks.3.net.3.weight",
        "model.blocks.3.net.4.bias",
        "model.blocks.1.downsample.bias",
        "model.output_net.2.weight",
    }
    assert "model.blocks.0.downsample.weight" not in names
    assert len(names) == 54  # as many as in a released file


def test_shapes_come_from_the_file(file, network, pixel_values):
    loaded = official.load(file)
    assert_nearly_equal(loaded.prompts(pixel_values), network.prompts(pixel_values))
    assert loaded.generator.num_virtual_tokens == 3
    assert loaded.library.tokens.shape == (6, 32)
    assert loaded.config().generator_width == 4


def test_it_becomes_an_adapter_whose_head_can_be_trained(file, network, pixel_values, tmp_path):
    base = tiny_vit()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = official.adapt(base, official.load(file), adapter_name="released", id2label={0: "cat", 1: "dog"})
    model(pixel_values, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert model.get_base_model().classifier.pgn_head["released"].weight.grad.abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "released")
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))
    prompts = loaded.get_base_model().vit.embeddings.prompts("default", pixel_values)
    assert_nearly_equal(prompts, network.prompts(pixel_values))
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_base_of_another_width_is_refused(file):
    with pytest.raises(RuntimeError, match=r"size mismatch for tokens: .*\[6, 32\].*\[6, 64\]"):
        official.adapt(tiny_vit(hidden_size=64), official.load(file))


def change(file, **tensors):
    state = torch.load(file, weights_only=True)
    for name, tensor in tensors.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save(state, file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tl_vectors": torch.zeros(3)}, r"is not a released network: .* have the shapes \[\(3,\)"),
        ({"tl_vectors": torch.zeros(5, 32)}, "L logits for each prompt"),
        ({"tl_vectors": torch.full((6, 32), float("nan"))}, "tl_vectors holds NaN or infinity"),
        ({"model.blocks.2.net.4.bias": None}, "model.blocks.2.net.4.bias is missing"),
        ({"model.blocks.2.net.3.weight": torch.zeros(2, 2)}, r"has the shape \(2, 2\) instead of \(16, 16, 3, 3\)"),
        ({"tl_vectors": torch.zeros(1).expand(10**9, 32)}, "describes tensors that are larger than the file"),
        ({"epoch": 3}, "holds something else than tensors"),
    ],
)
def test_other_tensors_are_refused(tensors, message, file):
    change(file, **tensors)
    with pytest.raises(ValueError, match=f"network.pt.*{message}.*Give a .pt file of the official release"):
        official.load(file)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_are_not_unpickled(legacy, file, tmp_path):
    exploded = tmp_path / "exploded"
    if legacy:
        file.write_bytes(pickle.dumps(Bomb(exploded)))
    else:
        torch.save({"tl_vectors": Bomb(exploded)}, file)
    with pytest.raises(ValueError, match="network.pt' is damaged, or holds something else than tensors"):
        official.load(file)
    assert not exploded.exists()


def test_damaged_and_other_files_are_refused(file, tmp_path):
    content = file.read_bytes()
    for size in (0, 100, 20_000):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="network.pt' is damaged"):
            official.load(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(ValueError, match="holds something else than tensors"):
        official.load(file)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        official.load(tmp_path / "nowhere.pt")
