"""What the page of `app.py` does: each method of `App` answers one button, for the visitor who pressed it."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from adapter_training import KINDS, Task, train
from demo_models import PIXELS, TOKENS, DemoModels
from digits import NAMES
from huggingface_hub import InferenceClient
from matplotlib.figure import Figure
from PIL import Image
from sessions import Session, Sessions
from uploads import read_adapter, read_folder, read_zip

from pgn_peft import Classifier, load_classifier, make_prompter
from pgn_peft.inspection import attention_to_prompts, mixing_coefficients, own_answer
from pgn_peft.nn.image_files import open_image
from pgn_peft.plotting import OURS, THEIRS, plot_attention, plot_coefficients
from pgn_peft.tuner.adapters import active_adapter

ON_A_SPACE = "SPACE_ID" in os.environ
TRAINED, UPLOADED = "trained here", "uploaded"
DEMO_BASE = "the demo's tiny ViT"
SOURCES = ["digits, turned and inverted", "a zip of images", *([] if ON_A_SPACE else ["a folder on this machine"])]
MOST_IMAGES = 50
SHOWN_SIDE = 256  # of small images, in pixels

sessions = Sessions()


def said(function: Callable) -> Callable:
    """Show errors that say what to do as messages on the page."""

    @wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return call


def session_of(request: gr.Request) -> Session:
    """Return the visitor's session."""
    return sessions.get(request.session_hash or "")


def said_of_steps(function: Callable) -> Callable:
    """Do as `said`, for a function that yields."""

    @wraps(function)
    def call(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return call


class App:
    """What the page does.

    Args:
        demo: the models that it starts with.
    """

    def __init__(self, demo: DemoModels) -> None:
        self.demo = demo

    # Adapters.

    def load(self, session: Session, name: str) -> Classifier:
        """Return an adapter by its name in the list, id or folder."""
        name = (name or "").strip()
        found = session.find(name)
        if found is not None:
            return found
        if name in (TOKENS, PIXELS):
            self.demo.make()
            found = load_classifier(self.demo.adapter(name), base_model_name_or_path=self.demo.base)
        elif not name:
            raise ValueError("`adapter` must be an adapter's id, but got nothing. Choose one from the list.")
        elif name in (TRAINED, UPLOADED):
            raise ValueError(f"`adapter` must be one that is still there, but got {name!r}. Train or upload it again.")
        else:
            if ON_A_SPACE and not is_id(name):
                raise ValueError(f"`adapter` must be the id of one on the Hub, but got {name!r}. Write owner/name.")
            found = load_classifier(name)
        session.keep(name, found)
        return found

    def upload_adapter(self, file: str, request: gr.Request) -> Any:
        """Load the adapter in a zip."""
        session = session_of(request)
        folder = read_adapter(Path(file), session.new_folder())
        base = None
        if DemoModels.is_base(folder):
            self.demo.make()
            base = self.demo.base
        session.keep(UPLOADED, load_classifier(folder, base_model_name_or_path=base))
        return gr.Dropdown(choices=[TOKENS, PIXELS, UPLOADED], value=UPLOADED)

    def describe(self, name: str, request: gr.Request) -> str:
        """Say what an adapter is."""
        model = self.load(session_of(request), name).model
        _, config = active_adapter(model)
        labels = list((config.id2label or {}).values())
        where = "part of the image" if config.prompt_space == "pixel" else "tokens"
        listed = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
        count = (
            "a static prompt"
            if config.generator == "static"
            else f"mixed for each image out of {config.library_size} entries"
        )
        base = Path(config.base_model_name_or_path or "").name
        return f"**{name}**: prompts are {where}, {count}. Frozen model: {base}. Classes: {listed}."

    # Tab "classify".

    def classify(self, files: list | None, name: str, request: gr.Request) -> tuple[str, Any, Any]:
        """Classify images by the frozen model alone and with prompts: a table, and both answers to the first."""
        images = open_all(files)
        session = session_of(request)
        classifier = self.load(session, name)
        with session.lock:
            with_prompts = classifier.pipeline()(images, top_k=5, batch_size=8)
            alone = own_answers(classifier, images)
        lines = ["| # | the frozen model alone | with prompts |", "|---|---|---|"]
        for number, (own, ours) in enumerate(zip(alone, with_prompts, strict=True), start=1):
            lines.append(f"| {number} | {best(own)} | {best(ours)} |")
        return "\n".join(lines), for_label(alone[0]), for_label(with_prompts[0])

    def sample_digits(self, request: gr.Request) -> list[str]:
        """Return files of test digits, one of each class."""
        folder = session_of(request).folder / "digits"
        folder.mkdir(exist_ok=True)
        found: dict[int, str] = {}
        for image, label in self.demo.digits.files("test"):
            if label not in found:
                found[label] = str(folder / f"{NAMES[label]}.png")
                image.save(found[label])
        return [found[label] for label in sorted(found)]

    def sample_digit(self, request: gr.Request) -> str:
        """Return the file of one test digit."""
        return self.sample_digits(request)[7]

    # Tab "look inside".

    def look(self, file: str | None, name: str, request: gr.Request) -> tuple[Any, ...]:
        """Show mixing coefficients, attention to the prompts, and an image before and after."""
        (image,) = open_all([file] if file else None)
        session = session_of(request)
        classifier = self.load(session, name)
        with session.lock:
            model = classifier.model
            pixel_values = to_pixel_values(classifier, [image])
            _, config = active_adapter(model)
            coefficients = attention = before = sent = change = None
            in_pixels = config.prompt_space == "pixel"
            texts = []
            if config.generator == "static":
                texts.append("The prompts are the same for all images: nothing is mixed.")
            else:
                mixed = mixing_coefficients(model, pixel_values)[0]
                coefficients = draw(plot_coefficients, mixed, "How much of each library entry is in each prompt")
                strongest = mixed.mean(dim=0).topk(min(3, mixed.shape[1]))
                shares = (
                    f"entry {entry} ({share:.0%})"
                    for share, entry in zip(*map(torch.Tensor.tolist, strongest), strict=True)
                )
                texts.append(f"Most used of {mixed.shape[1]} library entries: {', '.join(shares)}.")
            if in_pixels:
                prompter = make_prompter(model, classifier.image_processor)
                plain, prompted = prompter.unprompted(image), prompter(image)
                before, sent = enlarged(plain), enlarged(prompted)
                if plain.size == prompted.size:
                    change, largest = amplified(plain, prompted)
                    texts.append(f"The largest change of a pixel is {largest} of 255 levels.")
            else:
                texts.append("The prompts are tokens: the image itself is not changed.")
                try:
                    attention = draw(
                        plot_attention,
                        attention_to_prompts(model, pixel_values),
                        "Attention of the class token to the prompts",
                    )
                except ValueError as error:
                    texts.append(str(error))
        plots = [gr.Plot(figure, visible=figure is not None) for figure in (coefficients, attention)]
        return " ".join(texts), *plots, gr.Row(visible=in_pixels), before, sent, change

    # Tab "train".

    def read_images(
        self, source: str, file: str | None, folder: str, session: Session
    ) -> tuple[list, list[str], list[str]]:
        """Return images, their classes and the names of all classes."""
        if source == SOURCES[0]:
            images, labels = zip(*self.demo.digits.files("train"), strict=True)
            return list(images), [NAMES[label] for label in labels], NAMES
        if source == SOURCES[1]:
            if file is None:
                raise ValueError(
                    "`zip` must be uploaded first, but got nothing. Upload images, a folder for each class."
                )
            found = read_zip(Path(file), session.new_folder())
        elif ON_A_SPACE:
            raise ValueError(f"`source` must be one of {', '.join(SOURCES)}, but got {source!r}. Upload a zip.")
        else:
            found = read_folder(Path(folder).expanduser())
        images, labels = zip(*found, strict=True)
        return list(images), list(labels), sorted(set(labels))

    def train(
        self, source: str, file: str | None, folder: str, base: str, kind: str, epochs: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Train, and yield how it stands: text, curve, the adapter's zip, and the list of adapters."""
        session = session_of(request)
        session.stop.clear()
        yield "reading the images", draw_curve([], None), gr.DownloadButton(interactive=False), gr.skip()
        images, labels, names = self.read_images(source, file, folder, session)
        base = base.strip()
        if base == DEMO_BASE:
            self.demo.make()
            base = str(self.demo.base)
        elif ON_A_SPACE and not is_id(base):
            raise ValueError(f"`model` must be the id of one on the Hub, but got {base!r}. Write owner/name.")
        task = Task(images, [names.index(label) for label in labels], names, base, kind, int(epochs), name=source)
        report, drawn = None, -1
        for report in train(task, session.new_folder(), session.stop):
            curve = gr.skip()
            if report.alone is not None and len(report.curve) > drawn:
                curve, drawn = draw_curve(report.curve, report.alone), len(report.curve)
            yield report.text, curve, gr.skip(), gr.skip()
        target = session.folder / "adapter"
        report.classifier.save_pretrained(target, report.facts)
        session.facts = report.facts
        session.keep(TRAINED, Classifier(report.classifier.model.eval(), report.classifier.image_processor))
        archive = shutil.make_archive(str(session.folder / "pgn-adapter"), "zip", target)
        yield (
            report.text,
            gr.skip(),
            gr.DownloadButton(value=archive, interactive=True),
            gr.Dropdown(choices=[TOKENS, PIXELS, TRAINED], value=TRAINED),
        )

    def stop(self, request: gr.Request) -> str:
        """Stop training after this step."""
        session_of(request).stop.set()
        return "stopping after this step"

    def push(self, repo_id: str, token: str, request: gr.Request) -> str:
        """Publish the adapter that was trained here."""
        session = session_of(request)
        classifier = session.find(TRAINED)
        if classifier is None:
            raise ValueError("`adapter` must be trained first, but got none. Train one above.")
        commit = classifier.push_to_hub(repo_id.strip(), session.facts, token=token.strip() or None)
        return f"published: {commit.commit_url}"

    # Tab "input only".

    def send(self, file: str | None, name: str, url: str, request: gr.Request) -> tuple[Any, ...]:
        """Send an image as it is and prompted to a model that takes images, and read its answers."""
        (image,) = open_all([file] if file else None)
        session = session_of(request)
        classifier = self.load(session, name)
        _, config = active_adapter(classifier.model)
        if config.prompt_space != "pixel":
            raise ValueError(
                f"`adapter` must have prompts that are part of the image, but got {name!r}, whose prompts are tokens. "
                f"Choose {PIXELS!r}, or train one with {KINDS[2]!r}."
            )
        with session.lock:
            prompter = make_prompter(classifier.model, classifier.image_processor)
            plain, prompted = prompter.unprompted(image), prompter(image)
            answers = [ask(url, classifier, shown, prompter.server_labels) for shown in (plain, prompted)]
        own = prompter.read_answer(answers[1])
        size = len(as_png(prompted))
        pixels = f"{prompted.width} x {prompted.height} pixels"
        text = f"Sent: a PNG of {pixels}, {size:,} bytes. The server's model is unchanged."
        return text, enlarged(plain), for_label(answers[0]), enlarged(prompted), answers[1][:5], for_label(own)


def is_id(name: str) -> bool:
    """Whether a name is the id of a repository, and no folder on this machine."""
    return name.count("/") == 1 and name[0] not in "/.~" and not Path(name).exists()


def open_all(files: list | None) -> list[Image.Image]:
    """Open uploaded images; a gallery gives pairs of file and caption."""
    if not files:
        raise ValueError("`images` must be uploaded first, but got none. Upload one, or take a digit.")
    if len(files) > MOST_IMAGES:
        raise ValueError(f"`images` must be at most {MOST_IMAGES}, but got {len(files)}. Choose fewer.")
    paths = [Path(file if isinstance(file, str) else file[0]) for file in files]
    return [open_image(path, name=path.name) for path in paths]


def to_pixel_values(classifier: Classifier, images: list[Image.Image]) -> torch.Tensor:
    """Run the image processor: (B, C, H, W)."""
    pixel_values: torch.Tensor = classifier.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixel_values


def own_answers(classifier: Classifier, images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Return the frozen model's own answers, as its server would give them; empty ones if it has no classes."""
    try:
        scores, names = own_answer(classifier.model, to_pixel_values(classifier, images))
    except ValueError:
        return [[] for _ in images]
    return [
        [{"label": names[index], "score": row[index].item()} for index in row.argsort(descending=True).tolist()]
        for row in scores
    ]


def ask(url: str, classifier: Classifier, image: Image.Image, labels: dict[int, str] | None) -> list[dict[str, Any]]:
    """Ask a server, or the frozen model itself, for the scores of all its classes."""
    if ON_A_SPACE or not url.strip():
        return own_answers(classifier, [image])[0]
    answer = InferenceClient(model=url.strip()).image_classification(as_png(image), top_k=len(labels or {}) or None)
    return [{"label": entry.label, "score": entry.score} for entry in answer]


def as_png(image: Image.Image) -> bytes:
    """Encode an image without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def best(answer: list[dict[str, Any]]) -> str:
    """Write the best label and its score."""
    return f"{answer[0]['label']} ({answer[0]['score']:.2f})" if answer else "- (it has no classes)"


def for_label(answer: list[dict[str, Any]]) -> dict[str, float] | None:
    """Return an answer as a label component takes it."""
    return {entry["label"]: entry["score"] for entry in answer[:5]} or None


def enlarged(image: Image.Image) -> Image.Image:
    """Show a small image larger, its pixels as squares."""
    factor = max(1, SHOWN_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def amplified(before: Image.Image, after: Image.Image) -> tuple[Image.Image, int]:
    """Draw the change on grey, the largest as black or white, and return that change in levels."""
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in (before, after)]
    change = pixels[1] - pixels[0]
    largest = int(change.abs().max())
    grey = (127.5 + change * (127.5 / max(largest, 1))).round().to(torch.uint8)
    return enlarged(Image.frombytes(before.mode, before.size, grey.numpy().tobytes())), largest


def draw(plot: Callable, values: torch.Tensor, title: str) -> Figure:
    """Plot into a figure that no other visitor's call knows of."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    plot(values, figure.subplots()).set_title(title, fontsize=11)
    return figure


def draw_curve(accuracies: list[float], alone: float | None) -> Figure:
    """Draw accuracy by epoch, and that of a linear head alone as a line across."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(accuracies) + 1)
    if accuracies:
        axes.plot(epochs, accuracies, "o-", color=OURS)
        axes.annotate(" with prompts", (epochs[-1], accuracies[-1]), color=OURS, va="center")
    if alone is not None:
        axes.axhline(alone, color=THEIRS, linestyle="--")
        axes.annotate("linear head alone ", (0, alone), color=THEIRS, va="bottom")
    axes.set(
        xlabel="epoch",
        ylim=(0, 1.05),
        xlim=(0, 1.25 * max(4, len(accuracies))),
        title="Accuracy on images that are held out",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
