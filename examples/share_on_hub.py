"""Publish a trained adapter on the Hub, with its image processor and a model card, and show what was published.

    hf auth login
    python examples/share_on_hub.py --adapter outputs/my-adapter --repo_id user/my-adapter \
        --dataset_name "Oxford Flowers 17" --license apache-2.0 --description "Flowers of England, from photographs."

The adapter is an output folder of `train_image_classifier.py`; its results.json fills the card's tables. Metrics can
be added with `--metric accuracy=0.94`. `--private` makes a private repository. `--dry_run` only writes the files, into
the adapter's subfolder to-publish. Others load the adapter with

    import pgn_peft
    classify = pgn_peft.load_classifier("user/my-adapter").pipeline()

`--smoke` trains a tiny adapter, makes a dry run and loads what it wrote, offline, in seconds; it ends with

    largest difference of a logit after loading 0.000
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import train_image_classifier
from image_data import smoke_arguments

from pgn_peft import Classifier, ModelCardInfo, load_classifier


def parse_metric(text: str) -> tuple[str, float]:
    """Split "accuracy=0.94"."""
    name, _, value = text.partition("=")
    return name, float(value)


def make_facts(options: argparse.Namespace) -> ModelCardInfo:
    """Collect the facts for the card, from the options and from the training run."""
    file = Path(options.adapter, "results.json")  # of the training script
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    metrics = dict(options.metric or ())
    if not metrics and results.get("test_accuracy") is not None and (options.dataset_name or options.dataset_id):
        metrics = {"accuracy": results["test_accuracy"]}
    training = {name: results[name] for name in ("epochs", "learning_rate", "train_images", "seed") if name in results}
    return ModelCardInfo(
        dataset_name=options.dataset_name,
        dataset_id=options.dataset_id,
        split=options.split,
        metrics=metrics,
        hyperparameters={name.replace("_", " "): value for name, value in training.items()},
        license=options.license,
        description=options.description,
    )


def largest_difference(one: Classifier, other: Classifier) -> float:
    """Compare two classifiers on noise of the size that the first one's processor makes."""
    channels = one.model.config.num_channels
    noise = torch.randint(0, 256, (4, channels, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixel_values = one.image_processor(images=list(noise), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        difference = one.model(pixel_values).logits - other.model(pixel_values).logits
    return difference.abs().max().item()


def main(command_line: list[str] | None = None) -> float | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="folder of a trained adapter")
    parser.add_argument("--repo_id", help="the repository to publish to, user/name")
    parser.add_argument("--dataset_name", help="name of the training images")
    parser.add_argument("--dataset_id", help="id of the training images on the Hub")
    parser.add_argument("--split", default="test", help="the split that the metrics were measured on")
    parser.add_argument("--metric", type=parse_metric, action="append", help="name=value; may be repeated")
    parser.add_argument("--license", help="identifier of the adapter's licence")
    parser.add_argument("--description", help="intended use and limitations")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--dry_run", action="store_true", help="only write the files")
    parser.add_argument("--smoke", action="store_true", help="a dry run with a tiny adapter, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            train_image_classifier.main(smoke_arguments(Path(folder)))
            options.adapter, options.dataset_name, options.dry_run = f"{folder}/adapter", "red and blue", True
        if not options.adapter or not (options.repo_id or options.dry_run):
            parser.error("--adapter and --repo_id are required")
        classifier = load_classifier(options.adapter)
        facts = make_facts(options)
        if not options.dry_run:
            commit = classifier.push_to_hub(options.repo_id, facts, private=options.private or None)
            print(f"published: {commit.commit_url}")
            return None
        name = options.repo_id or Path(options.adapter).name
        target = Path(options.adapter, "to-publish", name.rpartition("/")[2])  # the card is named after its folder
        classifier.save_pretrained(target, facts)
        print(target.joinpath("README.md").read_text(encoding="utf-8"))
        print(f"wrote {', '.join(sorted(path.name for path in target.iterdir()))} to {target}")
        difference = largest_difference(classifier, load_classifier(target))
        print(f"largest difference of a logit after loading {difference:.3f}")
        return difference


if __name__ == "__main__":
    main()
