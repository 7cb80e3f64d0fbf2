"""The Space, without a browser: what it does with uploads, with several visitors, and while it trains."""

import dataclasses
import re
import struct
import threading
import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import actions
import background
import gradio as gr
import input_search
import limits
import pytest
import sessions
import uploads
import yaml
from actions import DEMO_BASE, SOURCES, TRAINED, UPLOADED, App
from adapter_training import train
from background import watch
from conftest import HANG, ROOT
from demo_models import PIXELS, TOKENS, DemoModels
from deploy_input_only import hosted
from flowers import NAMES, image_processor
from peft import get_peft_model
from PIL import Image
from transformers import ViTForImageClassification

from pgn_peft import Classifier, PGNConfig, load_classifier
from pgn_peft.training import ladder
from pgn_peft.tuner.head import find_head

pytestmark = pytest.mark.slow
SPACE = ROOT / "examples" / "space"
ALICE, BOB = SimpleNamespace(session_hash="alice"), SimpleNamespace(session_hash="bob")


def png(colour="red", side=20):
    file = BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def zip_of(path, files):
    """Write a zip of files, contents by name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def colours(prefix="", number=4):
    """Images of two classes."""
    return {f"{prefix}{name}/{index}.png": png(name) for name in ("red", "blue") for index in range(number)}


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (colours(), ["blue", "red"]),
        ({**colours("data/train/"), **colours("data/test/")}, ["blue", "red"]),
        ({**colours("a/b/"), "__MACOSX/a/._x.png": b"", "a/notes.txt": b"text"}, ["blue", "red"]),
    ],
    ids=["classes", "splits", "in folders, with other files"],
)
def test_a_zip_of_images_has_the_classes_of_its_folders(files, classes, tmp_path):
    splits = uploads.read_zip(zip_of(tmp_path / "images.zip", files), tmp_path / "read")
    assert sum(map(len, splits.values())) == sum(name[-5].isdigit() for name in files)
    for rows in splits.values():
        assert rows.features["label"].names == classes
        for row in rows:
            assert row["image"].getpixel((0, 0)) == {0: (0, 0, 255), 1: (255, 0, 0)}[row["label"]]
    assert {file.parent for file in tmp_path.rglob("*.png")} == {tmp_path / "read"}


@pytest.mark.parametrize(
    ("encoding", "name", "read"),
    [
        ("utf-8", "\u732b", "\u732b"),
        ("utf-8", "cafe\u0301", "caf\u00e9"),
        ("gbk", "\u72d7", None),  # these bytes are also Korean and Japanese letters
    ],
)
def test_names_in_a_zip_are_read_as_utf_8_or_refused(encoding, name, read, tmp_path, monkeypatch):
    # `zipfile` marks other names than ASCII as UTF-8; the tools of many systems do not.
    monkeypatch.setattr(
        zipfile.ZipInfo, "_encodeFilenameFlags", lambda self: (self.filename.encode(encoding), self.flag_bits)
    )
    zip_of(tmp_path / "images.zip", {**colours(), f"{name}/0.png": png(), f"{name}/1.png": png()})
    if read is None:
        with pytest.raises(ValueError, match="not in UTF-8.*Give the folders names in plain letters"):
            uploads.read_zip(tmp_path / "images.zip", tmp_path / "read")
    else:
        rows = uploads.read_zip(tmp_path / "images.zip", tmp_path / "read")["train"]
        assert set(rows.features["label"].names) == {"red", "blue", read}


def truncated(path):
    zip_of(path, colours())
    path.write_bytes(path.read_bytes()[:300])


def bomb(path):
    zip_of(path, {**colours(), "red/bomb.png": bytes(uploads.MOST_UNPACKED + 1)})


def lying_bomb(path):
    """Write a bomb whose directory claims that the file is small."""
    bomb(path)
    size = struct.pack("<L", uploads.MOST_UNPACKED + 1)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<L", 100)))


def encrypted(path):
    zip_of(path, colours())
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for match in re.finditer(re.escape(signature), bytes(content)):
            content[match.start() + place] |= 1
    path.write_bytes(bytes(content))


def lzma_zip(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in colours().items():
            archive.writestr(name, content)


BAD_ZIPS = {
    "truncated": (truncated, "damaged or has a password"),
    "encrypted": (encrypted, "damaged or has a password"),
    "another packing": (lzma_zip, "packed in an unusual way"),
    "loose beside splits": (
        lambda path: zip_of(path, {**colours("train/"), "test/0.png": png()}),
        "'test/0.png' has no class",
    ),
    "another program's": (
        lambda path: zip_of(path, {**colours(), "red/x.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}),
        "'red/x.png' cannot be read",
    ),
    "many files": (lambda path: zip_of(path, {f"a/{n}.txt": "" for n in range(4001)}), "more than 4,000 files"),
    "lying bomb": (lying_bomb, "damaged|more than 250 MB"),
    "50 MB": (lambda path: path.open("wb").truncate(uploads.MOST_UPLOADED + 1), "more than 50 MB"),
    "climbing": (lambda path: zip_of(path, colours("../../")), "There are no images"),
    "one class": (lambda path: zip_of(path, {"a/1.png": png(), "a/2.png": png()}), "2 images of 1 classes"),
    "one image": (lambda path: zip_of(path, {**colours(), "green/0.png": png("green")}), "Too few images of green"),
}


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_a_bad_zip_is_refused_with_the_reason_and_leaves_nothing(name, tmp_path):
    make, message = BAD_ZIPS[name]
    make(tmp_path / "images.zip")
    with pytest.raises(ValueError, match=message):
        uploads.read_zip(tmp_path / "images.zip", tmp_path / "read")
    assert [path.name for path in tmp_path.rglob("*")] == ["images.zip"]


def test_an_adapter_is_taken_out_of_a_zip_by_the_names_of_its_files(tmp_path):
    files = dict.fromkeys(uploads.ADAPTER_FILES, b"content") | {"training_args.bin": b"a pickle"}
    folder = uploads.read_adapter(zip_of(tmp_path / "a.zip", files), tmp_path / "read")
    assert sorted(path.name for path in folder.iterdir()) == sorted(uploads.ADAPTER_FILES)
    nested = {f"a/{name}": b"own" for name in files} | {f"a/checkpoint-1/{name}": b"other" for name in files}
    folder = uploads.read_adapter(zip_of(tmp_path / "nested.zip", nested), tmp_path / "nested")
    assert {path.read_bytes() for path in folder.iterdir()} == {b"own"}
    with pytest.raises(ValueError, match="holds no adapter"):
        uploads.read_adapter(zip_of(tmp_path / "b.zip", {"x.txt": b""}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_large_images_are_made_smaller(tmp_path):
    large = {**colours(), "red/0.png": png(side=2000)}
    uploads.read_zip(zip_of(tmp_path / "images.zip", large), tmp_path / "read")
    assert {Image.open(file).size for file in (tmp_path / "read").iterdir()} == {(20, 20), (1024, 1024)}


def test_what_an_adapter_asks_for_is_limited(tmp_path):
    config, processor = tmp_path / "adapter_config.json", tmp_path / "preprocessor_config.json"
    config.write_text('{"base_model_name_or_path": "owner/model", "num_virtual_tokens": 16}', encoding="utf-8")
    processor.write_text('{"size": {"height": 224, "width": 224}}', encoding="utf-8")
    assert limits.check_adapter(tmp_path) == "owner/model"
    processor.write_text('{"size": {"height": 4096, "width": 4096}}', encoding="utf-8")
    with pytest.raises(ValueError, match="4096 pixels large; at most 1024"):
        limits.check_adapter(tmp_path)
    config.write_text('{"base_model_name_or_path": "owner/model", "num_virtual_tokens": 65536}', encoding="utf-8")
    with pytest.raises(ValueError, match="65536 prompts; at most 1024"):
        limits.check_adapter(tmp_path)
    for text in ("[]", "{}", "[" * 10_000):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="does not hold settings|pixels large"):
            limits.check_adapter(tmp_path)


def test_each_visitor_has_a_session_and_a_closed_one_leaves_nothing():
    everyone = sessions.Sessions()
    alice, bob = everyone.get("alice"), everyone.get("bob")
    assert everyone.get("alice") is alice is not bob
    assert alice.folder != bob.folder
    everyone.close("alice")
    assert alice.stop.is_set()
    assert not alice.folder.exists()
    assert bob.folder.exists()
    everyone.close("bob")


def test_of_too_many_sessions_the_one_that_was_not_used_longest_is_closed(monkeypatch):
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 2)
    everyone = sessions.Sessions()
    first, second = everyone.get("first"), everyone.get("second")
    everyone.get("first")
    third = everyone.get("third")
    assert (first.closed, second.closed, third.closed) == (False, True, False)
    for name in ("first", "third"):
        everyone.close(name)


def test_of_many_adapters_the_oldest_is_dropped():
    session = sessions.Session()
    for index in range(sessions.MOST_LOADED + 1):
        session.keep(str(index), object())
    assert list(session.loaded) == [str(index) for index in range(1, sessions.MOST_LOADED + 1)]
    session.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's models, hardly trained."""
    models = DemoModels(tmp_path_factory.mktemp("demo"), epochs=1)
    models.make()
    return models


@pytest.fixture
def app(demo):
    yield App(demo)
    actions.sessions.close("alice")
    actions.sessions.close("bob")


@pytest.fixture
def training(demo, monkeypatch):
    """A training on a few flowers, of 4 steps for each method."""
    for name, value in {"EPOCHS": 0, "FEWEST_STEPS": 4, "SHORTEST": 4}.items():
        monkeypatch.setattr(ladder, name, value)
    splits = demo.flowers.rows()
    splits["train"], splits["validation"] = splits["train"].select(range(40)), splits["validation"].select(range(10))
    return partial(train, splits, str(demo.base), 10, "flowers", {})


def test_the_table_of_methods_grows_and_one_is_chosen(training):
    reports = list(watch(training, threading.Event()))
    rows = [len(report.table.splitlines()) for report in reports]
    assert rows == sorted(rows)
    assert {4, 8} <= set(rows)  # two lines above the first row; six methods
    assert any(re.match(r"static prompts, first layer: step \d+ of \d+", report.text) for report in reports)
    *_, last = reports
    chosen = re.match(r"Chosen: (.+), accuracy [01]\.\d{3} on 50 images in cross-validation\. It is", last.text)
    assert f"| **{chosen[1]}** |" in last.table
    assert len(last.facts.training_log) == 6
    assert isinstance(last.classifier.model.peft_config["default"], PGNConfig)


def test_a_training_that_is_stopped_keeps_what_is_chosen(training):
    stop, texts = threading.Event(), []
    for report in watch(training, stop):
        texts.append(report.text)
        if "step" in report.text:
            stop.set()
    assert texts[-1].startswith("Chosen: ")
    assert 4 <= len(report.table.splitlines()) < 8
    assert report.classifier is not None


def test_a_computation_stops_when_its_time_is_over(training, monkeypatch):
    monkeypatch.setattr(background, "SECONDS", -1)
    with pytest.raises(ValueError, match="There was no result yet"):
        list(watch(training, threading.Event()))


def test_a_computation_stops_when_nobody_watches(training):
    stop = threading.Event()
    running = watch(training, stop)
    while "step" not in next(running).text:
        pass
    running.close()
    assert stop.is_set()
    for thread in threading.enumerate():
        if thread.name == background.THREAD:
            thread.join(timeout=HANG)  # it ends by itself
    assert background.THREAD not in {thread.name for thread in threading.enumerate()}


def test_a_visitor_classifies_looks_inside_trains_and_loads_the_download(app, demo):
    flowers = app.sample_flowers(ALICE)
    assert [name for _, name in flowers] == NAMES
    table, alone, ours = app.classify(flowers, TOKENS, ALICE)
    assert len(table.splitlines()) == 2 + len(NAMES)
    assert set(alone) | set(ours) <= set(NAMES)

    text, coefficients, attention, row, *pictures = app.look(flowers[0][0], TOKENS, ALICE)
    assert "Most used of 32 library entries" in text
    assert (coefficients.visible, attention.visible, row.visible) == (True, True, False)
    assert pictures == [None] * 3
    text, coefficients, attention, row, before, sent, change = app.look(flowers[0][0], PIXELS, ALICE)
    assert (coefficients.visible, attention.visible, row.visible) == (True, False, True)
    assert before.size == sent.size == change.size == (64, 64)

    *_, (summary, _, download, adapters) = app.train(SOURCES[0], None, "", DEMO_BASE, 0.1, ALICE)
    assert re.match(r"Chosen: .+, accuracy [01]\.\d{3} on 240 held-out images", summary)
    assert adapters.value == TRAINED
    assert app.look(flowers[0][0], TRAINED, ALICE)[-1] is None
    _, *trained = app.classify(flowers, TRAINED, ALICE)
    assert app.upload_adapter(download.value["path"], BOB).value == UPLOADED
    _, *uploaded = app.classify(flowers, UPLOADED, BOB)
    assert uploaded == [pytest.approx(scores, abs=1e-5) for scores in trained]
    with pytest.raises(ValueError, match="Choose an adapter that is there"):
        app.classify(flowers, TRAINED, BOB)  # it is Alice's
    with pytest.raises(ValueError, match="is not on the Hub"):
        app.push("alice/flowers", "", ALICE)
    with pytest.raises(ValueError, match="Train an adapter first"):
        app.push("bob/flowers", "", BOB)


def test_the_input_alone_is_sent_and_the_answer_read(app, demo):
    flower = app.sample_flower(ALICE)
    text, _, before, _, raw, read = app.send(flower, PIXELS, "", ALICE)
    assert "64 x 64 pixels" in text
    assert sum(before.values()) > 0.5
    # The same answer as with the prompts inside the model.
    inside = load_classifier(demo.adapter(PIXELS), base_model_name_or_path=demo.base).pipeline()(
        Image.open(flower).convert("RGB")
    )
    assert read == pytest.approx({entry["label"]: entry["score"] for entry in inside}, abs=1e-3)
    assert raw[0]["label"] == max(read, key=read.get)
    with pytest.raises(ValueError, match="are tokens. Choose"):
        app.send(flower, TOKENS, "", ALICE)


@pytest.mark.parametrize(
    ("files", "message"),
    [(None, "1 to 50 images"), (["text"], "cannot be read"), (["x"] * 51, "1 to 50 images")],
    ids=["none", "text", "many"],
)
def test_bad_images_are_refused_on_the_page(files, message, app, tmp_path):
    path = tmp_path / "image.png"
    path.write_text("text", encoding="utf-8")
    with pytest.raises(gr.Error, match=message):
        actions.with_messages(app.classify)(files and [str(path)] * len(files), TOKENS, ALICE)


def test_on_a_space_visitors_name_ids_only(app, demo, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(actions, "ON_A_SPACE", True)
    for name in (str(tmp_path), "../x", "~/x", "name", "examples/space"):
        with pytest.raises(ValueError, match="is not the id of a repository on the Hub"):
            app.classify([app.sample_flower(ALICE)], name, ALICE)
        with pytest.raises(ValueError, match="is not the id of a repository on the Hub"):
            list(app.train(SOURCES[0], None, "", name, 0.1, ALICE))
    # Not even by the adapter in a zip.
    foreign = demo.adapter(TOKENS)
    copy = {name: foreign.joinpath(name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}
    copy["adapter_config.json"] = copy["adapter_config.json"].replace(str(demo.base).encode(), str(tmp_path).encode())
    with pytest.raises(ValueError, match=f"{str(tmp_path)!r} is not the id of a repository"):
        app.upload_adapter(str(zip_of(tmp_path / "a.zip", copy)), ALICE)
    actions.session_of(ALICE).own[TRAINED] = object()
    with pytest.raises(ValueError, match="token with write access is needed"):
        app.push("alice/flowers", " ", ALICE)
    with pytest.raises(ValueError, match="There is no folder"):
        list(app.train("a folder on this machine", None, str(tmp_path), DEMO_BASE, 0.1, ALICE))


def test_an_empty_folder_or_model_is_refused_before_training(app):
    for values in (
        (SOURCES[1], None, "", DEMO_BASE),
        (SOURCES[2], None, "/nowhere", DEMO_BASE),
        (SOURCES[0], None, "", " "),
    ):
        with pytest.raises(gr.Error, match=r"first|no folder|not the id"):
            list(actions.with_messages(app.train)(*values, 0.1, ALICE))


def test_a_session_that_is_closed_during_a_training_leaves_nothing(app):
    running = app.train(SOURCES[0], None, "", DEMO_BASE, 1, ALICE)
    session = actions.session_of(ALICE)
    for text, *_ in running:
        if "step" in text:
            actions.sessions.close("alice")
    assert session.closed
    assert not session.training
    assert not session.folder.exists()


def test_one_visitor_computes_one_thing_at_a_time(app):
    running = app.train(SOURCES[0], None, "", DEMO_BASE, 0.1, ALICE)
    next(running)
    with pytest.raises(ValueError, match="still runs"):
        next(app.train(SOURCES[0], None, "", DEMO_BASE, 0.1, ALICE))
    with pytest.raises(ValueError, match="still runs"):
        next(app.search(SOURCES[0], None, "", TOKENS, "", ALICE))
    running.close()
    assert not actions.session_of(ALICE).training


def test_a_search_by_calls_alone_says_the_cost_first_and_ends_with_the_accuracy(app, tmp_path):
    archive = str(zip_of(tmp_path / "images.zip", colours(number=20)))
    shown = list(app.search(SOURCES[1], archive, "", TOKENS, "", ALICE))
    cost = "At most 200 calls for 32 training images, then 24 for 8 held-out images."
    assert shown[1][1].startswith(cost)
    rows = [len(table.splitlines()) for _, table in shown]
    assert rows == sorted(rows)
    text, table = shown[-1]
    assert re.match(r"Sent for each image: .+\. Accuracy on 8 held-out images: .+; unchanged images alone .+ ± ", text)
    assert table.count("**") == 2
    assert "| **unchanged** |" in table  # colours are told apart without a change


def test_a_search_calls_a_server_that_is_named(app, demo, tmp_path):
    archive = str(zip_of(tmp_path / "images.zip", colours()))
    with hosted(str(demo.base)) as url:
        *_, (text, _) = app.search(SOURCES[1], archive, "", TOKENS, url, ALICE)
    assert text.startswith("Sent for each image: ")


def test_a_search_can_be_stopped_and_needs_two_images_of_each_class(app, tmp_path):
    shown = []
    for report in app.search(SOURCES[0], None, "", TOKENS, "", ALICE):
        shown.append(report)
        if report[0].startswith("call"):
            app.stop(ALICE)
    assert shown[-1][0] == "stopped"
    assert "At most" in shown[-1][1]
    archive = str(zip_of(tmp_path / "images.zip", colours(number=2)))
    with pytest.raises(ValueError, match=f"Use {input_search.FEWEST} images of each"):
        list(app.search(SOURCES[1], archive, "", TOKENS, "", ALICE))


def test_a_head_that_the_servers_scores_do_not_determine_is_refused_before_sending(app, demo):
    scale = [0.5] * 3
    config = PGNConfig(
        prompt_space="pixel", image_size=64, image_mean=scale, image_std=scale, id2label={0: "blue", 1: "red"}
    )
    model = get_peft_model(ViTForImageClassification.from_pretrained(demo.base), config)
    actions.session_of(ALICE).own[UPLOADED] = Classifier(model.eval(), image_processor())
    with pytest.raises(ValueError, match="from 6 scores"):
        app.send(app.sample_flower(ALICE), UPLOADED, "", ALICE)


def test_of_classes_with_the_same_name_the_best_is_shown():
    answer = [{"label": "crane", "score": 0.6}, {"label": "heron", "score": 0.2}, {"label": "crane", "score": 0.1}]
    assert actions.for_label(answer) == {"crane": 0.6, "heron": 0.2}


def test_a_model_without_classes_has_no_answer_of_its_own(app, tmp_path):
    classifier = load_classifier(app.demo.adapter(TOKENS), base_model_name_or_path=app.demo.base)
    head = find_head(classifier.model)
    head.base_labels = dataclasses.replace(head.base_labels, id2label={n: f"LABEL_{n}" for n in range(6)})  # a new one
    assert actions.own_answers(classifier, [Image.new("RGB", (64, 64))]) == [[]]


def test_unexpected_errors_are_shown_by_their_kind_only():
    def fail():
        raise RuntimeError("/a/path/of/the/server")

    with pytest.raises(gr.Error, match=r"failed unexpectedly \(RuntimeError\)"):
        actions.with_messages(fail)()


def test_the_page_has_four_tabs_and_the_folder_the_metadata_of_a_space(demo):
    import app as page

    blocks = page.build(App(demo))
    tabs = [block.label for block in blocks.blocks.values() if isinstance(block, gr.Tab)]
    assert tabs == ["Classify", "Look inside", "Train", "Input only"]
    _, metadata, _ = SPACE.joinpath("README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(metadata)
    assert facts["sdk"] == "gradio"
    assert Path(SPACE, facts["app_file"]).is_file()
    assert len(facts["short_description"]) <= 60  # the Hub refuses longer ones
    requirements = SPACE.joinpath("requirements.txt").read_text(encoding="utf-8")
    assert f"gradio=={facts['sdk_version']}" in requirements


def test_the_change_is_drawn_on_grey():
    before, after = Image.new("RGB", (2, 1), (100, 100, 100)), Image.new("RGB", (2, 1), (100, 100, 100))
    after.putpixel((1, 0), (110, 90, 100))
    drawn, largest = actions.amplified(before, after)
    assert largest == 10
    assert drawn.getpixel((0, 0)) == (128, 128, 128)
    assert drawn.getpixel((1, 0)) == (255, 0, 128)
