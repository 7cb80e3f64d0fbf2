"""Adapters on a Hub on loopback, with the real client: pushed, loaded, refused, and what becomes of a failed push."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FILES, TOKEN, answer, assert_nearly_equal, move_adapter, tiny_config, tiny_vit
from huggingface_hub import ModelCard
from loopback_hub import Fault, use_hub
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTImageProcessor

from pgn_peft import Classifier, ModelCardInfo, load_classifier

NAMES = {0: "cat", 1: "dog"}


@pytest.fixture
def adapter(hub, tmp_path):
    """An adapter in a folder, on a base that is on the Hub, with a processor of another size than the base's."""
    tiny_vit(num_labels=10).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    hub.put("user/vit", tmp_path / "vit")
    model = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path / "vit"), tiny_config(id2label=NAMES))
    model.peft_config["default"].base_model_name_or_path = "user/vit"
    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    Classifier(move_adapter(model).eval(), processor).save_pretrained(tmp_path / "adapter")
    pixel_values = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    logits = answer(model, pixel_values, interpolate_pos_encoding=True)
    save_file({"pixel_values": pixel_values, "logits": logits}, tmp_path / "expected.safetensors")
    return tmp_path / "adapter"


def load(*requests):
    """Load adapters: of each whether it answers as expected, the size of its images, its first label; or the error."""
    expected = load_file("expected.safetensors")
    outcomes = []
    for request in requests:
        try:
            model, processor = load_classifier(request.pop("id"), **request)
        except OSError as error:
            outcomes.append(str(error))
            continue
        found = answer(model, expected["pixel_values"])
        right = found.shape == expected["logits"].shape
        if right:
            assert_nearly_equal(found, expected["logits"])
        outcomes.append([right, processor.size["height"], model.config.id2label[0]])
    return outcomes


LOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from pgn_peft import load_classifier
model, processor = load_classifier(sys.argv[1])
assert processor.size["height"] == 48 and model.config.id2label[0] == "cat"
with torch.no_grad():
    save_file({"logits": model(load_file("expected.safetensors")["pixel_values"]).logits}, "found.safetensors")
"""


@pytest.mark.slow
def test_pushed_and_loaded_in_a_new_process(hub, adapter, tmp_path):
    facts = ModelCardInfo(dataset_name="Pets", metrics={"accuracy": 0.9375}, license="mit")
    load_classifier(adapter).push_to_hub("user/pets", facts, private=True)
    assert set(hub.repositories["user/pets"]) == FILES
    assert hub.repositories["user/pets"].private
    assert hub.repositories["user/pets"].log == ["initial commit", "Upload adapter"]
    data = ModelCard(hub.content("user/pets", "README.md").decode()).data
    assert (data.base_model, data.eval_results[0].metric_value) == ("user/vit", 0.9375)
    hub.requests.clear()
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "empty"), "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", LOAD, "user/pets"], env=environment, check=True)
    assert_nearly_equal(load_file("found.safetensors")["logits"], load_file("expected.safetensors")["logits"])
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched <= {"adapter_model.safetensors", "model.safetensors", *(n for n in fetched if n.endswith(".json"))}
    assert "README.md" not in fetched


def test_what_is_private_needs_a_token(hub, adapter, monkeypatch):
    hub.put("user/pets", adapter, private=True)
    monkeypatch.delenv("HF_TOKEN")
    refused, missing, found = load({"id": "user/pets"}, {"id": "user/nothing"}, {"id": "user/pets", "token": TOKEN})
    assert re.search("'user/pets' is not a folder, and cannot be read from the Hub.*401", refused)
    assert re.search("'user/nothing' is not a folder, and cannot be read from the Hub.*404", missing)
    assert found == [True, 48, "cat"]


def test_revisions_and_subfolders(hub, adapter, tmp_path):
    first = hub.put("user/pets", adapter)
    hub.repositories["user/pets"].refs["v1"] = first
    other = move_adapter(
        get_peft_model(ViTForImageClassification.from_pretrained(tmp_path / "vit"), tiny_config(num_labels=4)), seed=5
    )
    other.peft_config["default"].base_model_name_or_path = "user/vit"
    Classifier(other, ViTImageProcessor(size={"height": 40, "width": 40})).save_pretrained(tmp_path / "other")
    hub.put("user/pets", tmp_path / "other")
    hub.put("user/many", adapter, subfolder="pets/small/")
    outcomes = load(
        {"id": "user/pets"},
        {"id": "user/pets", "revision": "v1"},
        {"id": "user/pets", "revision": first},
        {"id": "user/pets", "revision": "v9"},
        {"id": "user/many", "subfolder": "pets/small"},
        {"id": "user/many"},
    )
    assert outcomes[0][1:] == [40, "LABEL_0"]
    assert outcomes[1] == outcomes[2] == outcomes[4] == [True, 48, "cat"]
    assert re.search("'user/pets' is not a folder, .* 404 .*revision/v9", outcomes[3], re.DOTALL)
    assert "There is no adapter_config.json in 'user/many'." in outcomes[5]


def test_offline_it_is_loaded_from_the_cache(hub, adapter, tmp_path, monkeypatch):
    hub.put("user/pets", adapter)
    assert load({"id": "user/pets"}) == [[True, 48, "cat"]]
    hub.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub, tmp_path / "cache", TOKEN, offline=True)
        loaded, absent = load({"id": "user/pets"}, {"id": "user/nothing"})
    assert loaded == [True, 48, "cat"]
    assert "outgoing traffic has been disabled" in absent
    loaded, empty = load(
        {"id": "user/pets", "local_files_only": True},
        {"id": "user/pets", "local_files_only": True, "cache_dir": "elsewhere"},
    )
    assert loaded == [True, 48, "cat"]
    assert "cannot be read from the Hub. Cannot find" in empty
    assert not hub.requests
    hub.faults.append(Fault("GET", "/", 500, times=100))
    assert load({"id": "user/pets"}) == [[True, 48, "cat"]]


def test_pickles_and_code_are_not_even_downloaded(hub, adapter, tmp_path):
    for folder in (adapter, tmp_path / "vit"):
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "modeling.py"):
            (folder / name).write_bytes(b"open('sprung', 'w')")
    hub.put("user/pets", adapter)
    hub.put("user/vit", tmp_path / "vit")
    (adapter / "adapter_model.safetensors").unlink()
    hub.put("user/pickled", adapter)
    loaded, refused = load({"id": "user/pets"}, {"id": "user/pickled"})
    assert loaded == [True, 48, "cat"]
    assert "There is no adapter_model.safetensors in 'user/pickled'." in refused
    assert "Pickled weights (adapter_model.bin) are not read" in refused
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched
    assert not [request for request in fetched if request.endswith((".bin", ".py"))]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".bin", ".py")]


def test_a_push_replaces_what_an_earlier_one_left(hub, adapter, tmp_path):
    left_over = tmp_path / "left_over"
    left_over.mkdir()
    stale = {"image_processor": ViTImageProcessor(size={"height": 64, "width": 64}).to_dict()}
    (left_over / "processor_config.json").write_text(json.dumps(stale), encoding="utf-8")
    (left_over / "example-of-mine.jpg").write_bytes(b"somebody's own file")
    hub.put("user/pets", left_over)
    classifier = load_classifier(adapter)
    own = FILES | {"example-of-mine.jpg"}
    for _ in range(2):
        classifier.push_to_hub("user/pets", save_directory="kept")
    classifier.push_to_hub("user/other", save_directory="kept")
    assert set(hub.repositories["user/pets"]) == own
    assert set(hub.repositories["user/other"]) == {path.name for path in (tmp_path / "kept").iterdir()} == FILES
    assert load({"id": "user/pets"}) == [[True, 48, "cat"]]


def test_a_push_keeps_what_people_wrote_into_the_card(hub, adapter, tmp_path):
    classifier = load_classifier(adapter)
    classifier.push_to_hub("user/pets", ModelCardInfo(license="mit"))
    edited = tmp_path / "edited"
    edited.mkdir()
    text = hub.content("user/pets", "README.md").decode() + "\nIt fails at night.\n"
    (edited / "README.md").write_text(text.replace("license: mit", "license: mit\nlanguage: en"), encoding="utf-8")
    hub.put("user/pets", edited)
    classifier.push_to_hub("user/pets", ModelCardInfo(license="apache-2.0"))
    card = ModelCard(hub.content("user/pets", "README.md").decode())
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert card.text.endswith("It fails at night.\n")
    assert card.text.count("## Use") == 1


# Pushes that fail.


def push(adapter, times):
    """Push an adapter a number of times; of each the error, or None."""
    outcomes, classifier = [], load_classifier(adapter)
    for _ in range(times):
        try:
            classifier.push_to_hub("user/pets")
            outcomes.append(None)
        except OSError as error:
            outcomes.append(str(error))
    return outcomes


FAILURES = [
    (Fault("POST", "/api/repos/create", 401), "401"),
    (Fault("POST", "/preupload/", 404), "404"),
    (Fault("POST", "/commit/", 429), "429"),
    (Fault("POST", "/commit/", None), ""),
]


def test_a_failed_push_loses_nothing_and_says_how_to_go_on(hub, adapter):
    hub.faults += [dataclasses.replace(fault) for fault, _ in FAILURES]
    lines = push(adapter, len(FAILURES) + 1)
    expected = load_file(adapter / "adapter_model.safetensors")
    assert lines.pop() is None
    for line, (_, reason) in zip(lines, FAILURES, strict=True):
        assert line.startswith("The upload to 'user/pets' failed: ")
        assert reason in line
        folder = Path(re.search(r"The adapter is saved in (\S+): push it again later\.$", line)[1])
        assert {path.name for path in folder.iterdir()} == FILES
        kept = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())
    # Nothing half done on the other side either.
    assert hub.repositories["user/pets"].log == ["initial commit", "Upload adapter"]
    assert set(hub.repositories["user/pets"]) == FILES


def test_a_connection_cut_in_the_middle_of_an_upload(hub, adapter):
    cut = Fault("PUT", "/lfs/", None, times=6)  # as often as the client tries
    hub.faults.append(cut)
    failed, pushed = push(adapter, 2)
    assert cut.times == 0
    assert "The adapter is saved in" in failed
    assert pushed is None
    assert hub.repositories["user/pets"].log == ["initial commit", "Upload adapter"]
    assert load({"id": "user/pets"}) == [[True, 48, "cat"]]
    # One that is cut once succeeds by itself.
    hub.faults.append(Fault("POST", "/preupload/", 429))
    assert push(adapter, 1) == [None]
    assert not any(fault.times for fault in hub.faults)


def test_a_base_that_nobody_else_has_is_refused(hub, adapter, tmp_path):
    file = adapter / "adapter_config.json"
    edited = {"base_model_name_or_path": str(tmp_path / "vit"), "checksums": None}
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | edited),
        encoding="utf-8",
    )
    message = f"The base model {str(tmp_path / 'vit')!r} is not on the Hub"
    with pytest.raises(ValueError, match=re.escape(message)):
        push(adapter, 1)
    assert "user/pets" not in hub.repositories


def test_a_branch_a_message_and_a_folder_of_ones_own(hub, adapter, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/training_args.bin").write_bytes(b"a pickle")
    classifier = load_classifier(adapter)

    def push():
        classifier.push_to_hub("user/pets", revision="v2", commit_message="Second", save_directory="kept")

    push()
    for name in ("no id/at/all", "pets"):
        with pytest.raises(ValueError, match=f"{name!r} is not the id of a repository"):
            classifier.push_to_hub(name)
    pets = hub.repositories["user/pets"]
    assert set(pets) == set()
    assert set(pets.commits[pets.refs["v2"]]) == FILES
    assert pets.log[-1] == "Second"
    assert {path.name for path in (tmp_path / "kept").iterdir()} == FILES | {"training_args.bin"}
