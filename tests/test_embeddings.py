"""Services that return embeddings: the heads that classify what they return."""

import pytest
import torch
from conftest import assert_same, tiny_config, tiny_vit
from peft import get_peft_model
from transformers import ViTImageProcessor

from pgn_peft import ImagePrompter, make_prompter

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def prompter():
    config = tiny_config(prompt_space="pixel", image_mean=MEAN, image_std=STD, num_virtual_tokens=None)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    return make_prompter(
        get_peft_model(tiny_vit("CLIPVisionModelWithProjection", projection_dim=6), config), processor
    )


def test_texts_classify_embeddings_by_their_cosines(prompter, tmp_path):
    texts = torch.eye(2, 6) * torch.tensor([[3.0], [0.5]])
    prompter.use_texts(texts, {0: "river", 1: "forest"}, logit_scale=10.0)
    embeddings = torch.tensor([[3.0, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2]])
    assert torch.allclose(prompter.classify(embeddings), torch.tensor([[6.0, 8.0], [0, 0]]))
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert_same(loaded.classify(embeddings), prompter.classify(embeddings))
    assert loaded.id2label == {0: "river", 1: "forest"}
    with pytest.raises(ValueError, match="There are 2 text embeddings, but `id2label` has 1 names"):
        prompter.use_texts(texts, {0: "river"})


def test_a_head_is_fitted_to_embeddings_of_any_length(prompter):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(200, 6, generator=generator)
    labels = (embeddings[:, 1] > embeddings[:, 2]).long()
    with pytest.raises(ValueError, match="The task's classes have no names: set prompter.id2label"):
        prompter.fit_embeddings(embeddings, labels)
    prompter.id2label = {0: "river", 1: "forest"}
    assert prompter.fit_embeddings(embeddings, labels) > 0.95
    assert (prompter.classify(embeddings).argmax(1) == labels).double().mean() > 0.95
    assert torch.allclose(prompter.classify(7 * embeddings), prompter.classify(embeddings), atol=1e-4)
