"""Facts of a run of `train_image_classifier.py` for the model card: data set, hyperparameters, results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pgn_peft import CardFacts


def describe_data(dataset: str) -> CardFacts:
    """Name the training images; `dataset` is a folder, or an id on the Hub."""
    if Path(dataset).exists():
        return CardFacts(dataset_name=Path(dataset).resolve().name)
    return CardFacts(dataset_id=dataset)


def add_results(facts: CardFacts, results: dict) -> CardFacts:
    """Add a run's results. The accuracy on validation is none of the metrics, because it chose the epoch."""
    rows = {
        "training images": f"{results['train_images']:,}",
        "accuracy on validation": f"{results['validation_accuracy']:.4f} (the best epoch was chosen by it)",
    }
    tested = results["test_accuracy"] is not None
    return dataclasses.replace(
        facts,
        metrics={"accuracy": results["test_accuracy"]} if tested else {},
        split="test",
        hyperparameters=rows | dict(facts.hyperparameters),
    )
