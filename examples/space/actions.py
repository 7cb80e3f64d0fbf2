"""What the page of `app.py` does: each method of `App` answers one button, for the visitor who pressed it."""

from __future__ import annotations

import inspect
import io
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import limits
import torch
from adapter_training import train
from background import watch
from datasets import DatasetDict
from demo_models import PIXELS, TOKENS, DemoModels
from deploy_input_only import as_png
from flowers import NAMES
from huggingface_hub import InferenceClient
from image_data import DataArguments, load_splits
from input_search import search
from limits import ON_A_SPACE, TOKEN
from matplotlib.figure import Figure
from PIL import Image, ImageChops
from plotting import plot_attention, plot_coefficients
from sessions import Session, Sessions
from train_image_classifier import square_side
from uploads import read_adapter, read_image, read_zip

from pgn_peft import Classifier, load_classifier, make_prompter
from pgn_peft.inspection import attention_to_prompts, base_predictions, mixing_coefficients

TRAINED, UPLOADED = "trained here", "uploaded"
DEMO_BASE = "the demo's tiny ViT"
SOURCES = ["flowers at night", "a zip of images", *([] if ON_A_SPACE else ["a folder on this machine"])]
ADAPTER = "default"  # PEFT's name for a model's only adapter
MOST_IMAGES = 50
SHOWN_CLASSES = 20
ALL_SCORES = 10_000  # to ask a server for
WORKERS = 8  # calls of a server at the same time
USUAL_SIDE = 224  # of a server's images, where the adapter's are not square

logger = logging.getLogger(__name__)
sessions = Sessions()


@contextmanager
def messages() -> Iterator[None]:
    """Show errors on the page: those that say what to do as they are, others by their kind."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, OSError, TypeError, httpx.HTTPError) as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error
    except Exception as error:
        logger.exception("unexpected")
        raise gr.Error(f"This failed unexpectedly ({type(error).__name__}). Try another file or model.") from error


def with_messages(function: Callable) -> Callable:
    """Show the errors of a function, or of one that yields, on the page."""

    @wraps(function)
    def call(*values: Any) -> Any:
        with messages():
            return function(*values)

    @wraps(function)
    def steps(*values: Any) -> Iterator[Any]:
        with messages():
            yield from function(*values)

    return steps if inspect.isgeneratorfunction(function) else call


def session_of(request: gr.Request) -> Session:
    """Return the visitor's session."""
    return sessions.get(request.session_hash or "")


@contextmanager
def computing(session: Session) -> Iterator[Path]:
    """Let a visitor compute one thing at a time, in a folder that is removed afterwards."""
    if session.training:
        raise ValueError("A training or search of yours still runs. Stop it, or wait.")
    session.training, session.stop = True, threading.Event()
    try:
        with session.temporary_folder() as folder:
            yield Path(folder)
    finally:
        session.training = False
        if session.closed:
            session.close()  # what was written meanwhile


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
        found = session.own.get(name, session.loaded.get(name))
        if found is not None:
            return found
        if name in (TOKENS, PIXELS):
            self.demo.make()
            found = load_classifier(self.demo.adapter(name), base_model_name_or_path=self.demo.base)
        elif name in ("", TRAINED, UPLOADED):
            raise ValueError("Choose an adapter that is there. Train or upload one of an earlier visit again.")
        else:
            found = self.load_checked(limits.fetch_adapter(name)) if ON_A_SPACE else load_classifier(name)
        session.keep(name, found)
        return found

    def load_checked(self, folder: Path) -> Classifier:
        """Load an adapter that may be anybody's from a folder."""
        base = limits.check_adapter(folder)
        if DemoModels.is_base(base):
            self.demo.make()
            return load_classifier(folder, base_model_name_or_path=self.demo.base)
        if ON_A_SPACE:
            limits.check_model(base)
        elif not (limits.is_id(base) or Path(base).is_dir()):
            raise ValueError(
                f"The adapter was made for {base!r}, a folder of another machine. Name a model on the Hub."
            )
        return load_classifier(folder, token=TOKEN)

    def upload_adapter(self, file: str, request: gr.Request) -> Any:
        """Load the adapter in a zip."""
        session = session_of(request)
        with session.temporary_folder() as folder:
            session.own[UPLOADED] = self.load_checked(read_adapter(Path(file), Path(folder, "adapter")))
        return choices(session, UPLOADED)

    def describe(self, name: str, request: gr.Request) -> str:
        """Say what an adapter is."""
        config = self.load(session_of(request), name).model.peft_config[ADAPTER]
        labels = list((config.id2label or {}).values())
        where = "part of the image" if config.prompt_space == "pixel" else "tokens"
        listed = ", ".join(labels[:SHOWN_CLASSES])
        more = f", and {len(labels) - SHOWN_CLASSES} more" if len(labels) > SHOWN_CLASSES else ""
        mixed = f"mixed for each image out of {config.library_size} entries"
        count = "the same for all images" if config.generator == "static" else mixed
        base = Path(config.base_model_name_or_path or "").name
        what = f"prompts are {where}, {count}" if config.num_virtual_tokens else "a linear head, without prompts"
        return f"**{name}**: {what}. Frozen model: {base}. Classes: {listed}{more}."

    # Tab "classify".

    def classify(self, files: list | None, name: str, request: gr.Request) -> tuple[str, Any, Any]:
        """Classify images by the frozen model alone and with prompts: a table, and both answers to the first."""
        images = open_all(files)
        session = session_of(request)
        classifier = self.load(session, name)
        with session.lock:
            with_prompts = classifier.pipeline()(images, top_k=5, batch_size=8)
            alone = own_answers(classifier, images)
        lines = ["| image | the frozen model alone | with prompts |", "|---|---|---|"]
        for number, (own, ours) in enumerate(zip(alone, with_prompts, strict=True), start=1):
            caption = files[number - 1][1] or number
            lines.append(f"| {caption} | {best(own)} | {best(ours)} |")
        return "\n".join(lines), for_label(alone[0]), for_label(with_prompts[0])

    def sample_flowers(self, request: gr.Request) -> list[tuple[str, str]]:
        """Return files of test flowers, one of each class, and what they show."""
        folder = session_of(request).folder / "flowers"
        folder.mkdir(exist_ok=True)
        files = []
        for (image, _), name in zip(self.demo.flowers.files("test"), NAMES, strict=False):  # the first ones of all
            files.append((str(folder / f"{name}.png"), name))
            image.save(files[-1][0])
        return files

    def sample_flower(self, request: gr.Request) -> str:
        """Return the file of one test flower."""
        return self.sample_flowers(request)[0][0]

    # Tab "look inside".

    def look(self, file: str | None, name: str, request: gr.Request) -> tuple[Any, ...]:
        """Show mixing coefficients, attention to the prompts, and an image before and after."""
        (image,) = open_all([file] if file else None)
        session = session_of(request)
        classifier = self.load(session, name)
        with session.lock:
            model = classifier.model
            pixel_values = to_pixel_values(classifier, [image])
            config = model.peft_config[ADAPTER]
            coefficients = attention = before = sent = change = None
            texts = ["The prompts are the same for all images: nothing is mixed."]
            if config.generator != "static":
                mixed = mixing_coefficients(model, pixel_values)[0]
                coefficients = draw(plot_coefficients, mixed, "How much of each library entry is in each prompt")
                strongest = mixed.mean(dim=0).topk(min(3, mixed.shape[1]))
                shares = [f"entry {int(entry)} ({float(share):.0%})" for share, entry in zip(*strongest, strict=True)]
                texts = [f"Most used of {mixed.shape[1]} library entries: {', '.join(shares)}."]
            in_pixels = config.prompt_space == "pixel"
            if in_pixels:
                prompter = make_prompter(model, classifier.image_processor)
                plain, prompted = prompter.unprompted(image), prompter(image)
                before, sent = plain, prompted
                change, largest = amplified(plain, prompted)
                texts.append(f"The largest change of a pixel is {largest} of 255 levels.")
            else:
                texts.append("The prompts are tokens: the image itself is not changed.")
                try:
                    shown = attention_to_prompts(model, pixel_values)
                    attention = draw(plot_attention, shown, "Attention of the class token to the prompts")
                except ValueError as error:  # attention that is not computed as a whole
                    texts.append(str(error))
        plots = [gr.Plot(figure, visible=figure is not None) for figure in (coefficients, attention)]
        return " ".join(texts), *plots, gr.Row(visible=in_pixels), before, sent, change

    # Tab "train".

    def read_images(self, source: str, file: str | None, folder: str, unpacked: Path) -> DatasetDict:
        """Return training and validation images."""
        if source == SOURCES[0]:
            return self.demo.flowers.rows()
        if source == SOURCES[1]:
            if file is None:
                raise ValueError("Upload a zip of images first, with a folder for each class.")
            return read_zip(Path(file), unpacked)
        if ON_A_SPACE or not Path(folder).expanduser().is_dir():
            raise ValueError(
                f"There is no folder {folder!r} on this machine. Upload a zip, or look for a misspelt path."
            )
        return load_splits(DataArguments(folder), validation=0.2, test=0)

    def train(
        self, source: str, file: str | None, folder: str, base: str, minutes: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Train, and yield how it stands: text, table, the adapter's zip, and the list of adapters."""
        session = session_of(request)
        with computing(session) as run:
            yield "reading the images", "", gr.DownloadButton(interactive=False), gr.skip()
            splits = self.read_images(source, file, folder, run / "images")
            base = base.strip()
            if base == DEMO_BASE:
                self.demo.make()
                base = str(self.demo.base)
            elif ON_A_SPACE or not base:
                limits.check_model(base)
            report = None
            training = partial(train, splits, base, minutes, source, {"token": TOKEN})
            for report in watch(training, session.stop):
                yield report.text, report.table, gr.skip(), gr.skip()
            if session.closed or report is None or report.classifier is None:
                return
            session.facts, session.own[TRAINED] = report.facts, report.classifier
            report.classifier.save_pretrained(run / "adapter", report.facts)
            archive = shutil.make_archive(str(session.folder / "pgn-adapter"), "zip", run / "adapter")
            button = gr.DownloadButton(value=archive, interactive=True)
            yield report.text, report.table, button, choices(session, TRAINED)

    def stop(self, request: gr.Request) -> None:
        """Stop a training or a search after this step. What runs reports it, so that no later text hides it."""
        session_of(request).stop.set()

    def push(self, repo_id: str, token: str, request: gr.Request) -> str:
        """Publish the adapter that was trained here."""
        session = session_of(request)
        classifier = session.own.get(TRAINED)
        if classifier is None:
            raise ValueError("Train an adapter first.")
        if ON_A_SPACE and not token.strip():
            raise ValueError("A token with write access is needed. Make one in your settings.")
        with session.temporary_folder() as folder:
            commit = classifier.push_to_hub(
                repo_id.strip(), session.facts, token=token.strip() or None, save_directory=Path(folder, "adapter")
            )
        return f"published: {commit.commit_url}"

    # Tab "input only".

    def send(self, file: str | None, name: str, url: str, request: gr.Request) -> tuple[Any, ...]:
        """Send an image as it is and prompted to a model that takes images, and read its answers."""
        (image,) = open_all([file] if file else None)
        session = session_of(request)
        classifier = self.load(session, name)
        config = classifier.model.peft_config[ADAPTER]
        if config.prompt_space != "pixel":
            raise ValueError(f"The prompts of {name!r} are tokens. Choose {PIXELS!r}.")
        with session.lock:
            prompter = make_prompter(classifier.model, classifier.image_processor)
            if prompter.head is not None and prompter.score_head is None:
                raise ValueError(
                    f"The adapter's head cannot be computed from {len(prompter.server_labels or {})} scores. Train on "
                    "classes that the model has, or take a model with as many classes as features."
                )
            plain, prompted = prompter.unprompted(image), prompter(image)
            top_k = len(prompter.server_labels or {}) or None
            answers = [ask(url, classifier, as_png(shown), top_k) for shown in (plain, prompted)]
        read = prompter.read_answer(answers[1])
        pixels = f"{prompted.width} x {prompted.height} pixels"
        text = f"Sent: a PNG of {pixels}, {len(as_png(prompted)):,} bytes. The server's model is unchanged."
        return text, plain, for_label(answers[0]), prompted, answers[1][:5], for_label(read)

    def search(
        self, source: str, file: str | None, folder: str, name: str, url: str, request: gr.Request
    ) -> Iterator[tuple[str, str]]:
        """Search for a way of sending images to a model that takes images; yield how it stands: text and table."""
        session = session_of(request)
        with computing(session) as run:
            yield "reading the images", ""
            splits = self.read_images(source, file, folder, run / "images")
            classifier = self.load(session, name)
            is_server = bool(url.strip()) and not ON_A_SPACE

            def call(file: bytes) -> list[dict[str, Any]]:
                with nullcontext() if is_server else session.lock:
                    answer = ask(url, classifier, file, ALL_SCORES)
                if not answer:
                    raise ValueError(
                        "The adapter's frozen model has no classes to answer with. Choose another adapter."
                    )
                return answer

            side = square_side(classifier.image_processor) or USUAL_SIDE
            searching = partial(search, splits, call, side, WORKERS if is_server else 1)
            for report in watch(searching, session.stop):
                yield report.text, report.table


def choices(session: Session, chosen: str) -> gr.Dropdown:
    """Return the list of adapters with one of them chosen."""
    return gr.Dropdown(choices=[PIXELS, TOKENS, *session.own], value=chosen)


def open_all(files: list | None) -> list[Image.Image]:
    """Open uploaded images; a gallery gives pairs of file and caption."""
    if not files or len(files) > MOST_IMAGES:
        raise ValueError(f"Upload 1 to {MOST_IMAGES} images first, or take a flower; there are {len(files or [])}.")
    paths = [Path(file if isinstance(file, str) else file[0]) for file in files]
    return [read_image(path, path.name) for path in paths]


def to_pixel_values(classifier: Classifier, images: list[Image.Image]) -> torch.Tensor:
    """Run the image processor: (B, C, H, W), on the model's device."""
    pixel_values: torch.Tensor = classifier.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixel_values.to(next(classifier.model.parameters()).device)


def own_answers(classifier: Classifier, images: list[Image.Image]) -> list[list[dict[str, Any]]]:
    """Return the frozen model's own answers, as its server would give them; empty ones if it has no classes."""
    try:
        scores, names = base_predictions(classifier.model, to_pixel_values(classifier, images))
    except ValueError:
        return [[] for _ in images]
    if set(names.values()) == {f"LABEL_{index}" for index in names}:  # a new head, of random numbers
        return [[] for _ in images]
    return [
        [{"label": names[index], "score": row[index].item()} for index in row.argsort(descending=True).tolist()]
        for row in scores
    ]


def ask(url: str, classifier: Classifier, file: bytes, top_k: int | None) -> list[dict[str, Any]]:
    """Ask a server for scores of an image file, or the frozen model itself for those of all its classes."""
    if ON_A_SPACE or not url.strip():
        return own_answers(classifier, [Image.open(io.BytesIO(file))])[0]
    answer = InferenceClient(model=url.strip()).image_classification(file, top_k=top_k)
    return [{"label": entry.label, "score": entry.score} for entry in answer]


def best(answer: list[dict[str, Any]]) -> str:
    """Write the best label and its score."""
    if not answer:
        return "- (it has no classes)"
    label = answer[0]["label"].replace("|", "\\|")
    return f"{label} ({answer[0]['score']:.2f})"


def for_label(answer: list[dict[str, Any]]) -> dict[str, float] | None:
    """Return an answer as a label component takes it; of classes with the same name, the best."""
    return {entry["label"]: entry["score"] for entry in reversed(answer[:5])} or None


def amplified(before: Image.Image, after: Image.Image) -> tuple[Image.Image, int]:
    """Draw the change on grey, the largest as black or white, and return that change in levels."""
    largest = max(high for _, high in ImageChops.difference(before, after).getextrema())
    return ImageChops.subtract(after, before, max(largest, 1) / 127.5, 128), largest


def draw(plot: Callable, values: torch.Tensor, title: str) -> Figure:
    """Plot into a figure that no other visitor's call knows of."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    plot(values, figure.subplots()).set_title(title, fontsize=11)
    return figure
