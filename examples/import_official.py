"""Convert a network that was released with the paper to an adapter for the backbone that it was trained for.

    python examples/import_official.py --checkpoint path/to/pgn_dino_eurosat.pt \
        --model_name_or_path facebook/dino-vits16 --num_labels 10 --output_dir outputs/dino-eurosat

The file contains the prompt generator and its library, but neither the backbone nor a classification head. The
adapter's head is new, and is trained like any other:

    import pgn_peft
    from peft import PeftModel
    from transformers import AutoModelForImageClassification
    base = AutoModelForImageClassification.from_pretrained("facebook/dino-vits16")
    model = PeftModel.from_pretrained(base, "outputs/dino-eurosat", is_trainable=True)

Pass the backbone that the network was trained for. The file does not name it, and prompts for one ViT-B/32 do not
work on another. Networks for CLIP need no training: with the names of its classes, a network becomes a classifier with
texts as classes, which `pgn_peft.load_classifier` loads. Names are in lower case and the default template is the
official code's; for CIFAR-100 pass "A photo of a {}", for CLEVR "This is a photo of {} objects" (`--templates`).

    python examples/import_official.py --checkpoint path/to/pgn_clip_eurosat.pt \
        --model_name_or_path openai/clip-vit-base-patch32 --labels "annual crop land" forest ... \
        --output_dir outputs/clip-eurosat

Without names it becomes an adapter of `CLIPVisionModelWithProjection`, which returns `image_embeds`. Without
`--model_name_or_path` the script only describes the file. `--smoke` writes a tiny network like the official code and
imports it, offline, in seconds; it ends with

    largest difference between the adapter's prompts and the network's: 0.000
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from image_data import smoke_arguments
from peft import AutoPeftModel
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from pgn_peft import Classifier, embed_texts, official, use_texts
from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.embeddings import own_image_size


def make_smoke(folder: Path, options: argparse.Namespace) -> None:
    """Write a tiny network under official names, and a tiny ViT for it."""
    smoke_arguments(folder)
    network = official.OfficialNetwork(PromptGenerator(4, 8, width=4), TokenLibrary(8, 32))
    torch.save(official.state_dict(network), folder / "network.pt")
    options.checkpoint = folder / "network.pt"
    options.model_name_or_path = str(folder / "vit")
    options.labels = ["blue", "red"]
    options.output_dir = folder / "adapter"


def describe(network: official.OfficialNetwork) -> str:
    """Describe a network's size in words."""
    generator, library = network.generator, network.library
    parameters = sum(p.numel() for part in (generator, library) for p in part.parameters())
    return (
        f"{generator.num_virtual_tokens} prompts of width {library.tokens.shape[1]}, mixed from "
        f"{generator.library_size} library tokens; {parameters:,} parameters"
    )


def load_base(model_name_or_path: str, has_texts: bool) -> PreTrainedModel:
    """Load a ViT as a classifier; CLIP with both towers if there are texts, else its vision tower with projection."""
    if AutoConfig.from_pretrained(model_name_or_path).model_type.startswith("clip"):
        model_class = CLIPModel if has_texts else CLIPVisionModelWithProjection
        return model_class.from_pretrained(model_name_or_path)
    return AutoModelForImageClassification.from_pretrained(model_name_or_path)


@torch.no_grad()
def compare(network: official.OfficialNetwork, folder: Path) -> float:
    """Load the adapter as users do, and return the largest difference of its prompts to the network's, on noise."""
    model = AutoPeftModel.from_pretrained(folder)
    layer = prompt_layer(model)
    pixel_values = torch.randn(4, layer.num_channels, *own_image_size(layer))
    prompts = layer.prompts(model.active_adapter, pixel_values)
    return (prompts - network.prompts(pixel_values)).abs().max().item()


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a released .pt file")
    parser.add_argument("--model_name_or_path", help="the backbone that it was trained for; without it, only describe")
    parser.add_argument("--labels", nargs="+", help="names of the classes, for a new head or for CLIP's texts")
    parser.add_argument(
        "--templates", nargs="+", default=["This is a photo of a {}"], help="sentences for the names of CLIP's classes"
    )
    parser.add_argument("--num_labels", type=int, help="number of classes, instead of names")
    parser.add_argument("--output_dir", default="outputs/official")
    parser.add_argument("--smoke", action="store_true", help="a tiny network and a tiny model, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            make_smoke(Path(folder), options)
        if options.checkpoint is None:
            parser.error("--checkpoint is required")
        network = official.load(options.checkpoint)
        print(describe(network))
        if options.model_name_or_path is None:
            return
        id2label = None if options.labels is None else dict(enumerate(options.labels))
        base = load_base(options.model_name_or_path, has_texts=id2label is not None)
        fields = {"head": "text"} if isinstance(base, CLIPModel) else {}
        model = official.adapt(base, network, id2label=id2label, num_labels=options.num_labels, **fields)
        if isinstance(base, CLIPModel):
            tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
            names = [name.lower() for name in options.labels]
            use_texts(model, embed_texts(base, tokenizer, names, options.templates))
        if id2label is None and options.num_labels is None:
            model.save_pretrained(options.output_dir)
        else:
            processor = AutoImageProcessor.from_pretrained(options.model_name_or_path)
            Classifier(model, processor).save_pretrained(options.output_dir)
        print(f"saved the adapter to {options.output_dir}")
        difference = compare(network, Path(options.output_dir))
        print(f"largest difference between the adapter's prompts and the network's: {difference:.3f}")


if __name__ == "__main__":
    main()
