"""Prompt Generation Networks to try in a browser: classify, look inside, train, adapt through the input alone.

    python examples/space/app.py  # or: make space

README.md says how it becomes a Hugging Face Space. It starts offline with the demo's tiny models, which are made on
the first start. On a Space (SPACE_ID is set there) visitors name ids on the Hub; on your own machine also folders and
servers.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
sys.path.append(str(Path(__file__).parents[1]))  # the scripts' modules; on a Space they are beside this file

import gradio as gr
from actions import DEMO_BASE, SOURCES, App, sessions, with_messages
from adapter_training import MINUTES, MOST_MINUTES
from demo_models import PIXELS, TOKENS, DemoModels
from limits import ON_A_SPACE
from uploads import MOST_UPLOADED

FOLDER = Path(__file__).parent
# Small images are shown as large as others. A phone has room for three images side by side.
CSS = """
.image-frame img {width: 100%; height: 100%; object-fit: contain}
#images .grid-container {grid-template-columns: repeat(auto-fill, minmax(min(30%, 180px), 1fr))}
#answers, #methods, #trials {overflow-x: auto}
#answers table, #methods table, #trials table {overflow-wrap: normal; word-break: normal}
#methods td:nth-child(2), #trials td:nth-child(2) {white-space: nowrap}
#methods td:last-child {min-width: 160px}
"""
# Images as they were uploaded: Gradio would convert those of 16 bits wrongly.
GIVEN = {"type": "filepath", "height": 260, "sources": ["upload", "clipboard"], "image_mode": None}
PICTURE = {"height": 260, "interactive": False, "format": "png"}


def leave(request: gr.Request) -> None:
    """Close the session of a visitor who closes the page."""
    sessions.close(request.session_hash or "")


def build(app: App) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="Prompt Generation Networks", delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# Prompt Generation Networks\nThis model knows flowers by day. It is **frozen**, and fails on flowers at "
            "night. A small network looks at each image and adds prompts that help the model with it."
        )
        with gr.Row(equal_height=True):
            where = "the id of one on the Hub" + ("" if ON_A_SPACE else ", or a folder")
            adapter = gr.Dropdown(
                [PIXELS, TOKENS],
                value=PIXELS,
                allow_custom_value=True,
                label="Adapter",
                info=f"From the list, or {where}",
                scale=4,
            )
            upload = gr.UploadButton("Upload an adapter (zip)", file_types=[".zip"], scale=1)
        about = gr.Markdown(elem_id="about")
        with gr.Tab("Classify"):
            gr.Markdown("Names images without and with prompts. Press *Classify*, or clear these and add your own.")
            images = gr.Gallery(
                label="Images", type="filepath", interactive=True, height=230, object_fit="contain", elem_id="images"
            )
            with gr.Row():
                flowers = gr.Button("Take six flowers")
                classify = gr.Button("Classify", variant="primary")
            with gr.Row():
                alone = gr.Label(label="First image: the frozen model alone", num_top_classes=3)
                ours = gr.Label(label="First image: with prompts", num_top_classes=3)
            table = gr.Markdown(elem_id="answers")
        with gr.Tab("Look inside"):
            gr.Markdown(
                "Shows which prompts an image gets and what they change. Take a flower, then press *Look inside*."
            )
            with gr.Row():
                with gr.Column(scale=1):
                    inside = gr.Image(label="Image", **GIVEN)
                    with gr.Row():
                        flower = gr.Button("Take a flower")
                        look = gr.Button("Look inside", variant="primary")
                    text = gr.Markdown(elem_id="inside")
                with gr.Column(scale=2):
                    coefficients = gr.Plot(show_label=False)
                    attention = gr.Plot(show_label=False)
            with gr.Row(visible=False) as pictures:
                before = gr.Image(label="Before", **PICTURE)
                sent = gr.Image(label="After, as it is sent", **PICTURE)
                change = gr.Image(label="Change, amplified, on grey", **PICTURE)
        with gr.Tab("Train"), gr.Row():
            with gr.Column(scale=1):
                gr.Markdown("Teaches the frozen model other images: these flowers, or yours in a zip. Press *Train*.")
                source = gr.Radio(SOURCES, value=SOURCES[0], label="Images")
                archive = gr.File(
                    label="Zip with a subfolder for each class",
                    file_types=[".zip"],
                    visible=False,
                    height=120,
                    elem_id="images-zip",
                )
                folder = gr.Textbox(label="Folder with a subfolder for each class", visible=False)
                base = gr.Textbox(
                    DEMO_BASE,
                    label="Frozen model",
                    info=f"An id on the Hub{'' if ON_A_SPACE else ' or a folder'}, or '{DEMO_BASE}'",
                )
                minutes = gr.Slider(1, MOST_MINUTES, value=MINUTES, step=1, label="Minutes for all methods")
                with gr.Row():
                    start = gr.Button("Train", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
            with gr.Column(scale=2):
                status = gr.Textbox(label="Progress", interactive=False, elem_id="progress")
                methods = gr.Markdown(elem_id="methods")
                download = gr.DownloadButton("Download the adapter (zip)", interactive=False)
                with gr.Accordion("Publish it on the Hub", open=False):
                    repo_id = gr.Textbox(label="Repository", placeholder="owner/name")
                    token = gr.Textbox(label="Token with write access", type="password")
                    push = gr.Button("Publish")
                    published = gr.Markdown()
        with gr.Tab("Input only"):
            gr.Markdown("The model stays as it is, on a server; the image changes. Take a flower, then press *Send*.")
            with gr.Row():
                with gr.Column():
                    given = gr.Image(label="Image", **GIVEN)
                    url = gr.Textbox(
                        label="Server", placeholder="empty: the frozen model in this process", visible=not ON_A_SPACE
                    )
                    with gr.Row():
                        one = gr.Button("Take a flower")
                        send = gr.Button("Send", variant="primary")
                    sent_text = gr.Markdown(elem_id="sent")
                with gr.Column():
                    plain = gr.Image(label="As it is", **PICTURE)
                    plain_answer = gr.Label(label="The server's answer to it", num_top_classes=3)
                with gr.Column():
                    prompted = gr.Image(label="As it is sent", **PICTURE)
                    raw = gr.JSON(label="The server's raw answer", height=180)
                    read = gr.Label(label="What we read in it", num_top_classes=3)
            gr.Markdown(
                "## Adapt it by calls alone\nTries changes of the image (colours, contrast, tiles) and keeps those "
                "that help most. Press *Search*; the images are those of the tab *Train*."
            )
            with gr.Row():
                find = gr.Button("Search", variant="primary")
                end = gr.Button("Stop", variant="stop")
            found = gr.Textbox(label="Progress", interactive=False, elem_id="search-progress")
            trials = gr.Markdown(elem_id="trials")

        page.load(with_messages(app.describe), adapter, about)
        page.load(with_messages(app.sample_flowers), None, images)
        adapter.change(with_messages(app.describe), adapter, about)
        # A list of adapters whose choice has the same name as before does not change.
        uploaded = upload.upload(with_messages(app.upload_adapter), upload, adapter)
        uploaded.then(with_messages(app.describe), adapter, about)
        flowers.click(with_messages(app.sample_flowers), None, images)
        classify.click(with_messages(app.classify), [images, adapter], [table, alone, ours])
        flower.click(with_messages(app.sample_flower), None, inside)
        look.click(
            with_messages(app.look), [inside, adapter], [text, coefficients, attention, pictures, before, sent, change]
        )
        source.change(
            lambda value: [gr.update(visible=value == SOURCES[1]), gr.update(visible=value not in SOURCES[:2])],
            source,
            [archive, folder],
        )
        trained = start.click(
            with_messages(app.train),
            [source, archive, folder, base, minutes],
            [status, methods, download, adapter],
            concurrency_limit=1,
            concurrency_id="computing",
        )
        trained.then(with_messages(app.describe), adapter, about)
        stop.click(app.stop, None, None, queue=False)
        push.click(with_messages(app.push), [repo_id, token], published, api_visibility="private")
        one.click(with_messages(app.sample_flower), None, given)
        send.click(
            with_messages(app.send), [given, adapter, url], [sent_text, plain, plain_answer, prompted, raw, read]
        )
        find.click(
            with_messages(app.search),
            [source, archive, folder, adapter, url],
            [found, trials],
            concurrency_limit=1,
            concurrency_id="computing",
        )
        end.click(app.stop, None, None, queue=False)
        page.unload(leave)
    return page


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    options = parser.parse_args(command_line)
    folder = FOLDER / "demo-models"
    demo = DemoModels(folder if os.access(FOLDER, os.W_OK) else None)
    threading.Thread(target=demo.make, daemon=True).start()  # the page is there meanwhile
    build(App(demo)).queue(max_size=20, default_concurrency_limit=2).launch(
        server_port=options.port,
        max_file_size=MOST_UPLOADED,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=["settings"],
    )


if __name__ == "__main__":
    main()
