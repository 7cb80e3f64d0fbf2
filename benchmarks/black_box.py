"""Adapts a model by calls alone (`adapt_black_box`), compared with a head on answers to images as they are.

    python benchmarks/black_box.py --model path/to/deit-tiny-patch16-224 --data path/to/eurosat path/to/cifar100 \
        path/to/flowers17 digits
    python benchmarks/black_box.py --model path/to/clip-vit-base-patch16-vision --answers embedding \
        --data path/to/tinyimagenet50 path/to/eurosat

The server is a frozen model in this process: encoded images of `--side` pixels to answers. What it answers
(`--answers`): the scores of all classes; the best five; all scores rounded to two significant digits or to two
decimals; or an embedding, which is the final CLS token of a classifier. A seed chooses the training images. All
choices are made by cross-validation on these, and the test split is used once.

Every run is appended to a file of JSON lines, and one that is in it is not repeated. `--smoke`: tiny, offline, in
seconds.
"""

from __future__ import annotations

import argparse
import io
import queue
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from statistics import mean, stdev
from threading import Thread
from typing import Any

import bench
import image_data
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, CLIPVisionModelWithProjection

from pgn_peft.nn.images import to_pixels
from pgn_peft.nn.preprocessing import Preprocessing, normalize
from pgn_peft.prompter import Calls, Views, adapt_black_box
from pgn_peft.prompter.black_box import make_candidates, plan_rungs

BATCH = 16
# What all runs of a table have in common, beside model and data.
PROTOCOL = ("side", "train_images", "test_images", "budget", "max_views", "precision")


class Server:
    """A frozen model that answers encoded images. Calls of several threads are computed as one batch.

    Args:
        path: id or path of a ViT with a classifier, or of CLIP's image tower.
        side: of the images, in pixels.
        precision: see `bench.autocast`.
    """

    def __init__(self, path: str, side: int, precision: str) -> None:
        self.clip = AutoConfig.from_pretrained(path).model_type.startswith("clip")
        if self.clip:
            self.model = CLIPVisionModelWithProjection.from_pretrained(path).eval().to(bench.DEVICE)
        else:
            self.model = bench.load_backbone(path, side)
        self.preprocessing = Preprocessing.from_processor(image_data.load_processor(path, side))
        self.precision = precision
        self.queue: queue.Queue[tuple[bytes, Future]] = queue.Queue()
        self.known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        Thread(target=self._serve, daemon=True).start()

    def __call__(self, file: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Answer an image with logits (K,) and features (D,); for CLIP both are the embedding."""
        if file not in self.known:
            future: Future = Future()
            self.queue.put((file, future))
            self.known[file] = future.result()
        return self.known[file]

    def _serve(self) -> None:
        while True:
            asked = [self.queue.get()]
            while len(asked) < BATCH and not self.queue.empty():
                asked.append(self.queue.get())
            try:
                answers = self._compute([file for file, _ in asked])
            except Exception as error:
                for _, future in asked:
                    future.set_exception(error)
                continue
            for (_, future), *answer in zip(asked, *answers, strict=True):
                future.set_result(tuple(answer))

    @torch.inference_mode()
    def _compute(self, files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        steps = self.preprocessing
        pixels = [steps.apply(to_pixels(Image.open(io.BytesIO(file)), 3)) for file in files]
        batch = normalize(torch.stack(pixels).float() / 255, steps.image_mean, steps.image_std).to(bench.DEVICE)
        with bench.autocast(self.precision):
            if self.clip:
                embeds = self.model(pixel_values=batch, interpolate_pos_encoding=True).image_embeds
                return (embeds.float().cpu().numpy(),) * 2
            features = self.model.vit(pixel_values=batch).last_hidden_state[:, 0]
        logits = self.model.classifier(features.float())
        return logits.cpu().numpy(), features.float().cpu().numpy()


def scores(server: Server, file: bytes, top_k: int | None = None, rounded: Callable[[float], float] = float) -> Any:
    """Answer an image with the best scores of the server's softmax, best first."""
    probabilities = torch.from_numpy(server(file)[0]).softmax(-1)
    values, places = probabilities.sort(descending=True)
    pairs = zip(places.tolist()[:top_k], values.tolist(), strict=False)
    return [{"label": str(place), "score": rounded(value)} for place, value in pairs]


ANSWERS: dict[str, Callable[[Server, bytes], Any]] = {
    "scores": scores,
    "top 5": lambda server, file: scores(server, file, top_k=5),
    "2 digits": lambda server, file: scores(server, file, rounded=lambda score: float(f"{score:.1e}")),
    "2 decimals": lambda server, file: scores(server, file, rounded=lambda score: round(score, 2)),
    "embedding": lambda server, file: server(file)[1].tolist(),
}


def run(server: Server, answers: str, jpeg_quality: int | None, seed: int, options: Any) -> dict[str, Any]:
    """Adapt to one choice of training images, and evaluate on test."""
    rows = (
        bench.digits()
        if options.data == "digits"
        else image_data.load_splits(image_data.DataArguments(options.data), seed=0)
    )
    names = image_data.class_names(rows["train"])
    train = rows["train"].select(image_data.spread(rows["train"], seed)[: options.train_images])
    test = rows["test"].select(image_data.spread(rows["test"], 0)[: options.test_images])
    calls = Calls(
        lambda file: ANSWERS[answers](server, file), jpeg_quality=jpeg_quality, workers=2 * BATCH, attempts=1
    )
    images = list(train["image"])
    candidates = make_candidates(options.side)
    found = adapt_black_box(
        images, train["label"], calls, names, options.side, candidates, options.max_views, options.budget
    )
    alone = Views([candidates["nothing"]])
    alone.prompters[0].id2label = dict(enumerate(names))
    alone.fit_answers([calls.answers(alone(images)[0])], train["label"])
    right = {name: classify(views, calls, test, names) for name, views in (("alone", alone), ("found", found.views))}
    gain = right["found"] - right["alone"]
    return {
        "names": list(found.names),
        "calls": found.calls,
        "planned_calls": plan_rungs(len(candidates), len(images), len(names), options.budget).calls,
        "number_of_train_images": len(images),
        "images": len(test),
        "head_alone": float(right["alone"].mean()),
        "accuracy": float(right["found"].mean()),
        "standard_error_of_gain": float(gain.std(ddof=1) / len(gain) ** 0.5),
        "cross_validated": {
            " + ".join(trial.names): [round(trial.accuracy, 4), round(trial.standard_error, 4)]
            for trial in found.trials
            if trial.images == len(images)
        },
    }


def classify(views: Views, calls: Calls, rows: Any, names: list[str]) -> np.ndarray:
    """Return for each image whether it is classified right, as 0 or 1."""
    answers = zip(*[calls.answers(images) for images in views(list(rows["image"]))], strict=True)
    found = [views.read_answers(each)[0]["label"] for each in answers]
    return np.array([label == names[true] for label, true in zip(found, rows["label"], strict=True)], dtype=float)


def report(rows: list[dict[str, Any]]) -> str:
    """Write a table: a line for each data set, size and kind of answer, with means over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        settings = row["settings"]
        key = ("model", "side", "data", "answers", "jpeg_quality")
        groups.setdefault(tuple(settings[name] for name in key), []).append(row)
    lines: list[list[object]] = [
        ["model", "pixels", "data", "answers", "file", "seeds", "head alone", "found", "gain", "views", "calls"]
    ]
    for (model, side, data, answers, quality), group in groups.items():
        gains = [row["accuracy"] - row["head_alone"] for row in group]
        spread = f" ± {stdev(gains):.3f}" if len(gains) > 1 else ""
        alone, found, views, calls = (
            mean(values)
            for values in zip(
                *((row["head_alone"], row["accuracy"], len(row["names"]), row["calls"]) for row in group), strict=True
            )
        )
        file = "PNG" if quality is None else f"JPEG {quality}"
        figures = [f"{alone:.3f}", f"{found:.3f}", f"{mean(gains):+.3f}{spread}", f"{views:.1f}", f"{calls:,.0f}"]
        lines.append([model, side, data, answers, file, len(group), *figures])
    return bench.markdown(lines)


def main(command_line: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", dest="all_data", nargs="+", help='"digits", folders with train, validation and test.parquet, ...'
    )
    parser.add_argument("--model", help="id or path of a ViT with a classifier, or of CLIP's image tower")
    parser.add_argument("--answers", nargs="+", choices=ANSWERS, default=["scores"])
    parser.add_argument("--jpeg_quality", type=int, help="send JPEG files; by default PNG")
    parser.add_argument("--results", default="outputs/black_box.jsonl", help="file of JSON lines, appended to")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3), help="each chooses the training images")
    parser.add_argument("--side", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--train_images", type=int, default=400)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--budget", type=float, default=20, help="most calls for each training image")
    parser.add_argument("--max_views", type=int, default=4)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="float32", help="of the server")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            data, options.model = bench.make_smoke(folder)
            options.all_data, options.results, options.side = [data], f"{folder}/results.jsonl", 32
            options.seeds, options.answers = (1,), ["embedding"]
        if not (options.all_data and options.model):
            parser.error("--data and --model are required")
        results = bench.Results(options.results)
        server = Server(options.model, options.side, options.precision)
        for data in options.all_data:
            options.data = data
            for seed in options.seeds:
                server.known.clear()
                for answers in options.answers:
                    key = {"answers": answers, "jpeg_quality": options.jpeg_quality, "seed": seed}
                    key |= {name: getattr(options, name) for name in PROTOCOL}
                    key |= {"data": Path(data).name, "model": Path(options.model).name}

                    def adapt(answers: str = answers, seed: int = seed) -> dict[str, Any]:
                        return run(server, answers, options.jpeg_quality, seed, options)

                    row = results.get(key, adapt)
                    tqdm.write(f"  {row['head_alone']:.3f} -> {row['accuracy']:.3f}: {' + '.join(row['names'])}")
        rows = list(results)
        print(report(rows))
    return rows


if __name__ == "__main__":
    main()
