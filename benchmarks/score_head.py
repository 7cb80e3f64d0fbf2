"""A head on a closed model's features, read from its scores: how many digits and how many scores it needs.

    python benchmarks/score_head.py --data ../shared/data/eurosat --model ../shared/models/deit-tiny-patch16-224

The server is a stock `ViTForImageClassification`; the images are not prompted. A linear head is fitted on its
features. The first table compares what `exact_score_head` computes from rounded scores with this head's own logits.
The second has the accuracy of heads fitted on answers alone (`fit_to_answers`). `--smoke`: tiny, offline, in seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
from image_data import smoke_arguments

from pgn_peft.nn.ridge import fit_ridge
from pgn_peft.prompter.score_fitting import fit_to_answers
from pgn_peft.prompter.score_head import exact_score_head

Rounding = Callable[[float], float]
ROUNDINGS: dict[str, Rounding] = {
    "float32": lambda score: score,
    **{f"{digits} digits": lambda score, d=digits: float(f"{score:.{d - 1}e}") for digits in (6, 4, 3, 2)},
    **{f"{decimals} decimals": lambda score, d=decimals: round(score, d) for decimals in (6, 4, 3)},
}


@torch.inference_mode()
def answer(model, material: bench.Material, split: str) -> tuple[Tensor, Tensor]:
    """Return the features (N, D) that the model's head reads, and its scores (N, K)."""
    found: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    batches = material.splits[split].pixels.split(50)
    scores = [model(material.normalized(pixels)).logits.softmax(-1) for pixels in batches]
    hook.remove()
    return torch.cat(found).cpu(), torch.cat(scores).cpu()


def as_answers(scores: Tensor, names: list[str], rounding: Rounding, top_k: int | None = None) -> list[list[dict]]:
    """Write scores (N, K) as a pipeline does: best first, with the names of the classes."""
    answers = []
    for row in scores:
        values, order = row.sort(descending=True)
        pairs = list(zip(order.tolist(), values.tolist(), strict=True))[:top_k]
        answers.append([{"label": names[index], "score": rounding(value)} for index, value in pairs])
    return answers


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or id of a data set")
    parser.add_argument("--model", help="id or path of the server's model")
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--max_train", type=int, default=1000)
    parser.add_argument("--max_test", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            arguments = smoke_arguments(Path(folder))
            options.model = arguments[arguments.index("--model_name_or_path") + 1]
            options.data, options.side = arguments[arguments.index("--dataset") + 1], 32
            many_classes = ViTConfig.from_pretrained(options.model, num_labels=60)  # more than features: 32
            ViTForImageClassification(many_classes).save_pretrained(options.model)
        material = bench.load_material(options.data, options.model, options.side, options.max_train, options.max_test)
        model = bench.load_backbone(options.model, options.side)
    labels = {name: material.splits[name].labels.cpu() for name in ("train", "test")}
    features, scores = answer(model, material, "train")
    test_features, test_scores = answer(model, material, "test")
    weight, bias, _ = fit_ridge(features, labels["train"], len(material.names))
    expected = test_features.double() @ weight.mT + bias
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]

    print(f"trained head: accuracy {(expected.argmax(1) == labels['test']).double().mean():.3f}")
    try:
        head = exact_score_head(model.classifier.weight, model.classifier.bias, weight, bias, names)
    except ValueError as error:
        print(f"no exact head: {error}")
    else:
        report = head.report
        print(f"rank {report.rank}, condition number {report.condition_number:.1f}, digits {report.digits} (bound)")
        print("\n| scores | same prediction | accuracy | error of a logit, r.m.s. | largest |\n|---|---|---|---|---|")
        for name, rounding in ROUNDINGS.items():
            found = head.read(as_answers(test_scores, names, rounding))
            same = (found.argmax(1) == expected.argmax(1)).double().mean()
            right = (found.argmax(1) == labels["test"]).double().mean()
            error = found - expected
            print(
                f"| {name} | {same:.3f} | {right:.3f} | {error.square().mean().sqrt():.2g} | {error.abs().max():.2g} |"
            )

    print("\n| fitted on answers with | kind | cross-validated | test accuracy |\n|---|---|---|---|")
    trials = [("all scores", "float32", None), ("all scores, 3 decimals", "3 decimals", None)]
    trials += [(f"top {number}", "float32", number) for number in (20, 5, 1)]
    for name, rounding, top_k in trials:
        answers = (as_answers(part, names, ROUNDINGS[rounding], top_k) for part in (scores, test_scores))
        head = fit_to_answers(next(answers), labels["train"], len(material.names))
        right = (head.read(next(answers)).argmax(1) == labels["test"]).double().mean()
        print(f"| {name} | {head.report.kind} | {head.report.accuracy:.3f} | {right:.3f} |")


if __name__ == "__main__":
    main()
