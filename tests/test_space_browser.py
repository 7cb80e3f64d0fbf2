"""The Space in a real browser. `make test-browser` installs what it needs; pictures of all tabs go to outputs/."""

import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from io import BytesIO

import pytest
from conftest import HANG, ROOT
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PORT = 7869
ADDRESS = f"http://127.0.0.1:{PORT}"
PICTURES = ROOT / "outputs" / "space"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page, as `make space` starts it, with a folder for temporary files of its own."""
    folder = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "examples/space/app.py"), "--port", str(PORT)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    # Whoever leaves the pipe full would stop the server.
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put("")], daemon=True).start()
    try:
        while ADDRESS not in (line := lines.get(timeout=HANG)):  # it prints its address when it is there
            assert line, "the page ended before it was there"
        yield folder
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser(server):
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"needs a browser, make test-browser: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Open the page as a new visitor; afterwards no visitor's console may hold an error."""
    contexts, errors = [], []

    def open_page(theme="light", width=1280, height=900, strict=True):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * HANG)
        if strict:
            page.on("console", lambda message: message.type == "error" and errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{ADDRESS}/?__theme={theme}")
        page.locator("#about", has_text="part of the image").wait_for()
        page.locator(".thumbnail-item").nth(5).wait_for()  # it opens with six flowers
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def tab(page, name):
    wanted = page.get_by_role("tab", name=name, exact=True).locator("visible=true")
    if not wanted.count():  # on a phone those that have no room are in a menu
        page.locator(".overflow-menu > button").click()
        wanted = page.locator(".overflow-dropdown button", has_text=name)
    wanted.click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def choose(page, adapter):
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name=adapter).click()
    page.locator("#about", has_text=adapter).wait_for()


def picture(page, name):
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True, animations="disabled")


def progress(page, text, box="#progress"):
    """Wait until the text of a training or search contains this, and return all of it."""
    found = page.locator(f"{box} textarea")
    page.wait_for_function("([box, text]) => box.value.includes(text)", arg=[found.element_handle(), text])
    return found.input_value()


def choose_zip(page, file):
    """Upload a zip, and wait until the page lists it: while it is sent, its name is there already."""
    page.locator("#images-zip input[type=file]").set_input_files(file)
    page.locator("#images-zip .file-preview", has_text=file.stem).wait_for()


def images_zip(path, number=6):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("red", "blue"):
            for index in range(number):
                file = BytesIO()
                Image.new("RGB", (24, 24), name).save(file, "PNG")
                archive.writestr(f"{name}/{index}.png", file.getvalue())
    return path


@pytest.mark.parametrize(
    ("theme", "width", "height"), [("light", 1280, 900), ("dark", 1280, 900), ("light", 390, 844), ("dark", 390, 844)]
)
def test_every_tab_at_desktop_and_phone_width_in_light_and_dark(visit, theme, width, height):
    page = visit(theme, width, height)
    name = f"{theme}-{width}"
    assert page.locator("body.dark").count() == (theme == "dark")
    press(page, "Classify")
    page.locator("#answers tr").nth(6).wait_for()
    assert re.match(r"[a-z]+ \(\d\.\d\d\)", page.locator("#answers td").nth(2).inner_text())
    picture(page, f"classify-{name}")

    tab(page, "Look inside")
    press(page, "Take a flower")
    page.locator(".image-frame img").first.wait_for()
    press(page, "Look inside")
    page.locator("#inside", has_text="The largest change of a pixel").wait_for()
    picture(page, f"inside-pixels-{name}")

    tab(page, "Input only")
    press(page, "Take a flower")
    page.locator(".image-frame img").locator("visible=true").first.wait_for()
    press(page, "Send")
    page.locator("#sent", has_text="64 x 64 pixels").wait_for()
    picture(page, f"input-only-{name}")

    choose(page, "demo: prompts as tokens")
    tab(page, "Look inside")
    press(page, "Look inside")
    page.locator("#inside", has_text="The prompts are tokens").wait_for()
    picture(page, f"inside-tokens-{name}")
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_train_watch_download_and_load_by_another_visitor(visit, tmp_path, width, height):
    page = visit(width=width, height=height)
    tab(page, "Train")
    page.get_by_label("a zip of images").check()
    choose_zip(page, images_zip(tmp_path / "images.zip", 20))
    press(page, "Train")
    page.locator("#methods tr").nth(1).wait_for()  # the first method, while the second one runs
    text = progress(page, "Chosen: ")
    assert "on 40 images in cross-validation" in text
    assert page.locator("#methods tr").count() == 7
    assert page.locator("#methods strong").inner_text() == "linear head"
    page.locator("#about", has_text="Classes: blue, red").wait_for()
    picture(page, f"train-zip-light-{width}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    with page.expect_download() as download:
        press(page, "Download the adapter (zip)")
    download.value.save_as(tmp_path / "adapter.zip")
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        assert "adapter_model.safetensors" in archive.namelist()

    other = visit()
    other.get_by_label("Adapter", exact=True).click()
    assert other.get_by_role("option", name="trained here").count() == 0  # it is the first visitor's
    other.keyboard.press("Escape")
    with other.expect_file_chooser() as chooser:
        press(other, "Upload an adapter (zip)")
    chooser.value.set_files(tmp_path / "adapter.zip")
    other.locator("#about", has_text="Classes: blue, red").wait_for()
    assert "uploaded" in other.locator("#about").inner_text()


def test_training_can_be_stopped_and_keeps_the_methods_until_then(visit):
    page = visit()
    tab(page, "Train")
    press(page, "Train")
    page.locator("#methods tr").nth(3).wait_for()
    progress(page, "static prompts, every layer: step")
    press(page, "Stop")
    assert "on 240 held-out images" in progress(page, "Chosen: ")
    assert page.locator("#methods tr").count() == 4
    picture(page, "train-light-1280")


@pytest.mark.parametrize(("theme", "width", "height"), [("light", 1280, 900), ("dark", 390, 844)])
def test_a_search_by_calls_alone_ends_with_what_is_sent_and_its_accuracy(visit, theme, width, height):
    page = visit(theme, width, height)
    tab(page, "Input only")
    press(page, "Search")
    page.locator("#trials", has_text=re.compile(r"At most 1,\d{3} calls for 200 training images, then 600")).wait_for()
    progress(page, "call", "#search-progress")
    text = progress(page, "Sent for each image: ", "#search-progress")
    assert re.search(r"Accuracy on 200 held-out images: 0\.\d{3}; unchanged images alone 0\.\d{3}", text)
    assert page.locator("#trials tr").count() > 20
    picture(page, f"search-{theme}-{width}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    press(page, "Search")
    progress(page, "call", "#search-progress")
    press(page, "Stop")
    progress(page, "stopped", "#search-progress")


def test_bad_uploads_get_a_message_and_the_page_goes_on(visit, server, tmp_path):
    page = visit()
    text = tmp_path / "image.png"
    text.write_text("text", encoding="utf-8")
    page.locator("input[type=file][multiple]").first.set_input_files(text)
    page.locator(".thumbnail-item").nth(6).wait_for()
    press(page, "Classify")
    page.get_by_text("cannot be read").wait_for()
    picture(page, "message-light-1280")

    broken = tmp_path / "broken.zip"
    broken.write_text("no zip", encoding="utf-8")
    large = tmp_path / "large.zip"
    with large.open("wb") as file:
        file.truncate(60 * 10**6)
    one = images_zip(tmp_path / "one.zip", 1)
    for file, message in (
        (broken, "damaged or has a password"),
        (one, "Too few images of"),
        (large, "exceed the maximum allowed size of 50"),
    ):
        page = visit(strict=file is not large)  # Gradio itself logs an error when it takes no more of a file
        tab(page, "Train")
        page.get_by_label("a zip of images").check()
        if file is large:  # which the server does not take at all
            page.locator("#images-zip input[type=file]").set_input_files(file)
        else:
            choose_zip(page, file)
            press(page, "Train")
        page.get_by_text(re.compile(message)).first.wait_for()
    assert not list(server.glob("pgn-space-*/*/files/*"))


def test_the_keyboard_is_enough(visit):
    page = visit()

    def go_to(name):
        for _ in range(60):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''")
            if focused.strip() == name:
                return
        raise AssertionError(f"the keyboard does not reach {name!r}")

    go_to("Take six flowers")
    page.keyboard.press("Enter")
    page.locator(".thumbnail-item").nth(5).wait_for()
    go_to("Classify")
    page.keyboard.press("Enter")
    page.locator("#answers tr").nth(6).wait_for()
    go_to("Look inside")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Look inside", exact=True).wait_for()
