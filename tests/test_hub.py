"""Adapters on a Hub on loopback: the real client, in new processes, because its address is fixed on import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from huggingface_hub import ModelCard
from loopback_hub import Fault, loopback_hub
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTImageProcessor

from pgn_peft import Classifier

pytestmark = pytest.mark.slow

NAMES = {0: "cat", 1: "dog"}
TOKEN = "hf_secret"
FILES = {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json", "README.md"}


@pytest.fixture
def hub():
    with loopback_hub(token=TOKEN) as hub:
        yield hub


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


@pytest.fixture
def run(hub, tmp_path):
    """Run code in a new process: a client of the Hub, with a cache of its own unless one is named."""

    def run(code, *arguments, token=TOKEN, cache="cache", check=True, **more):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / cache), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TMPDIR": str(tmp_path)} | more
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, "-c", code, *map(str, arguments)]
        outcome = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path, check=False
        )
        assert not check or outcome.returncode == 0, outcome.stderr
        return outcome

    return run


PUSH = """
import sys
from pgn_peft import CardFacts, load_classifier
facts = CardFacts(dataset_name="Pets", metrics={"accuracy": 0.9375}, license="mit")
classifier = load_classifier(sys.argv[1])
print(classifier.push_to_hub("user/pets", facts, private=True).oid)
"""
LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from pgn_peft import load_classifier
expected = load_file("expected.safetensors")
for options in json.loads(sys.argv[1]):
    try:
        model, processor = load_classifier(options.pop("id"), **options)
        with torch.no_grad():
            logits = model(expected["pixel_values"]).logits
        size = processor.size["height"]
        print(json.dumps([torch.equal(logits, expected["logits"]), size, model.config.id2label[0]]))
    except OSError as error:
        print(json.dumps(str(error)))
"""


def load(run, *options, **more):
    return [json.loads(line) for line in run(LOAD, json.dumps(options), **more).stdout.splitlines()]


def test_pushed_and_loaded_in_a_new_process(hub, adapter, run):
    run(PUSH, adapter)
    assert set(hub.repositories["user/pets"]) == FILES
    assert hub.repositories["user/pets"].private
    assert hub.repositories["user/pets"].log == ["initial commit", "Upload adapter"]
    data = ModelCard(hub.content("user/pets", "README.md").decode()).data
    assert (data.base_model, data.eval_results[0].metric_value) == ("user/vit", 0.9375)
    hub.requests.clear()
    assert load(run, {"id": "user/pets"}, cache="empty") == [[True, 48, "cat"]]
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched <= {"adapter_model.safetensors", "model.safetensors", *(n for n in fetched if n.endswith(".json"))}
    assert "README.md" not in fetched


def test_what_is_private_needs_a_token(hub, adapter, run):
    hub.put("user/pets", adapter, private=True)
    refused, missing, found = load(
        run, {"id": "user/pets"}, {"id": "user/nothing"}, {"id": "user/pets", "token": TOKEN}, token=None
    )
    assert "`pretrained_model_name_or_path` must be" in refused
    assert re.search("but got 'user/pets': .*401", refused)
    assert "needs a token (`hf auth login`)" in refused
    assert re.search("but got 'user/nothing': .*404", missing)
    assert found == [True, 48, "cat"]


def test_revisions_and_subfolders(hub, adapter, run, tmp_path):
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
        run,
        {"id": "user/pets"},
        {"id": "user/pets", "revision": "v1"},
        {"id": "user/pets", "revision": first},
        {"id": "user/pets", "revision": "v9"},
        {"id": "user/many", "subfolder": "pets/small"},
        {"id": "user/many"},
    )
    assert outcomes[0][1:] == [40, "LABEL_0"]
    assert outcomes[1] == outcomes[2] == outcomes[4] == [True, 48, "cat"]
    assert re.search("but got 'user/pets' at revision 'v9': .*404", outcomes[3])
    assert "`adapter_config.json` must be in the adapter, but got none in 'user/many'." in outcomes[5]


def test_offline_it_is_loaded_from_the_cache(hub, adapter, run):
    hub.put("user/pets", adapter)
    assert load(run, {"id": "user/pets"}) == [[True, 48, "cat"]]
    hub.requests.clear()
    loaded, absent = load(run, {"id": "user/pets"}, {"id": "user/nothing"}, HF_HUB_OFFLINE="1")
    assert loaded == [True, 48, "cat"]
    assert "offline, what was fetched before is found in the cache" in absent
    loaded, empty = load(
        run,
        {"id": "user/pets", "local_files_only": True},
        {"id": "user/pets", "local_files_only": True, "cache_dir": "elsewhere"},
    )
    assert loaded == [True, 48, "cat"]
    assert "but got 'user/pets': Cannot find" in empty
    assert not hub.requests
    hub.faults.append(Fault("GET", "/", 500, times=100))
    assert load(run, {"id": "user/pets"}) == [[True, 48, "cat"]]


def test_pickles_and_code_are_not_even_downloaded(hub, adapter, run, tmp_path):
    for folder in (adapter, tmp_path / "vit"):
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "modeling.py"):
            (folder / name).write_bytes(b"open('sprung', 'w')")
    hub.put("user/pets", adapter)
    hub.put("user/vit", tmp_path / "vit")
    (adapter / "adapter_model.safetensors").unlink()
    hub.put("user/pickled", adapter)
    loaded, refused = load(run, {"id": "user/pets"}, {"id": "user/pickled"})
    assert loaded == [True, 48, "cat"]
    assert "`adapter_model.safetensors` must be in the adapter, but got none in 'user/pickled'." in refused
    assert "Pickled weights (adapter_model.bin) are never read" in refused
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched
    assert not [request for request in fetched if request.endswith((".bin", ".py"))]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".bin", ".py")]


# Pushes that fail.

PUSHES = """
import json, sys
from pgn_peft import load_classifier
classifier = load_classifier(sys.argv[1])
for _ in range(int(sys.argv[2])):
    try:
        classifier.push_to_hub("user/pets")
        print(json.dumps(None))
    except OSError as error:
        print(json.dumps(str(error)))
"""

FAILURES = [
    (Fault("POST", "/api/repos/create", 401), "401", "Log in with `hf auth login`, or pass a token"),
    (
        Fault("POST", "/api/repos/create", 403),
        "403",
        "Use a token with write access, or a repository of your",
    ),
    (Fault("POST", "/preupload/", 404), "404", "Look for a misspelt name or branch"),
    (Fault("POST", "/commit/", 403), "403", "Use a token with write access, or a repository of your own"),
    (Fault("POST", "/commit/", 429), "429", "Wait until the Hub takes requests again"),
    (Fault("POST", "/commit/", 500), "500", "Try again later"),
    (Fault("POST", "/commit/", None), "", "Try again later"),
]


def test_a_failed_push_loses_nothing_and_says_how_to_go_on(hub, adapter, run):
    hub.faults += [fault for fault, _, _ in FAILURES]
    lines = [json.loads(line) for line in run(PUSHES, adapter, len(FAILURES) + 1).stdout.splitlines()]
    expected = load_file(adapter / "adapter_model.safetensors")
    assert lines.pop() is None
    for line, (_, reason, remedy) in zip(lines, FAILURES, strict=True):
        assert line.startswith("`repo_id` must be a repository that takes the upload, but got 'user/pets': ")
        assert reason in line
        assert re.search(rf"{re.escape(remedy)}.*, and push again, or run: hf upload user/pets /\S+$", line)
        folder = Path(re.search(r"Nothing is lost: the adapter is in (\S+)\. ", line)[1])
        assert {path.name for path in folder.iterdir()} == FILES
        kept = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())
    # Nothing half done on the other side either.
    assert hub.repositories["user/pets"].log == ["initial commit", "Upload adapter"]
    assert set(hub.repositories["user/pets"]) == FILES


def test_a_connection_cut_in_the_middle_of_an_upload(hub, adapter, run):
    cut = Fault("PUT", "/lfs/", None, times=6)  # as often as the client tries
    hub.faults.append(cut)
    failed, pushed = [json.loads(line) for line in run(PUSHES, adapter, 2).stdout.splitlines()]
    assert cut.times == 0
    assert "Nothing is lost: the adapter is in" in failed
    assert pushed is None
    assert hub.repositories["user/pets"].log == ["initial commit", "Upload adapter"]
    assert load(run, {"id": "user/pets"}, cache="empty") == [[True, 48, "cat"]]


def test_an_upload_that_was_cut_once_succeeds_by_itself(hub, adapter, run):
    hub.faults += [Fault("PUT", "/lfs/", None), Fault("PUT", "/lfs/", 500), Fault("POST", "/preupload/", 429)]
    assert [json.loads(line) for line in run(PUSHES, adapter, 1).stdout.splitlines()] == [None]
    assert not any(fault.times for fault in hub.faults)


def test_a_base_that_nobody_else_has_is_refused(hub, adapter, run, tmp_path):
    file = adapter / "adapter_config.json"
    edited = {"base_model_name_or_path": str(tmp_path / "vit"), "checksums": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | edited))
    outcome = run(PUSHES, adapter, 1, check=False)
    assert (
        f"`base_model_name_or_path` must be the id of a model on the Hub, but got '{tmp_path}/vit'" in outcome.stderr
    )
    assert "user/pets" not in hub.repositories


BRANCH = """
import sys
from pgn_peft import load_classifier
classifier = load_classifier(sys.argv[1])
classifier.push_to_hub("user/pets", revision="v2", commit_message="Second", save_directory="kept")
for name in ("no id/at/all", "pets"):
    try:
        classifier.push_to_hub(name)
    except ValueError as error:
        print(error)
"""


def test_a_branch_a_message_and_a_folder_of_ones_own(hub, adapter, run, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/training_args.bin").write_bytes(b"a pickle")
    outcome = run(BRANCH, adapter)
    for name in ("no id/at/all", "pets"):
        assert f"`repo_id` must be like 'user/name', but got {name!r}" in outcome.stdout
    pets = hub.repositories["user/pets"]
    assert set(pets) == set()
    assert set(pets.commits[pets.refs["v2"]]) == FILES
    assert pets.log[-1] == "Second"
    assert {path.name for path in (tmp_path / "kept").iterdir()} == FILES | {"training_args.bin"}
    hub.faults.append(Fault("POST", "/commit/", 500))
    failed = run(BRANCH, adapter, check=False)
    command = re.search("or run: (hf upload user/pets kept --revision v2 .*)", failed.stderr)[1].split()
    assert set(command[command.index("--include") :]) == FILES | {"--include"}
