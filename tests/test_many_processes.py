"""Two processes and one: the same images, the same weights, checkpoints and adapters that either can use."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import sharded_training
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ENVIRONMENT, HANG, ROOT, tiny_config, tiny_vit, with_output
from packaging.version import Version
from peft import AutoPeftModel, get_peft_model
from recorded_runs import recorded_run, several_labels
from safetensors.torch import load_file
from transformers import TrainingArguments

from pgn_peft import AdapterTrainer
from pgn_peft.training import broadcast_statistics

RESUMES_ON_CPUS = Version(transformers.__version__) >= Version("5.18")
CONFIGS = sorted(ROOT.joinpath("examples/accelerate").glob("*.yaml"))

# Plain gradient descent, unclipped: with Adam or clipping, gradients of the wrong scale would give the same weights.
COMPARABLE = (
    "--generator_norm group --augmentation none --recipe sgd --max_grad_norm 0 --num_train_epochs 2 "
    "--save_strategy steps --save_steps 4 --prompt_dropout 0"
)
KEPT = "--load_best_model_at_end false --per_device_train_batch_size 4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What all runs saw and hold, by name: one record for each process."""
    from image_data import smoke_arguments

    folder = tmp_path_factory.mktemp("runs")
    arguments = [*smoke_arguments(folder), *KEPT.split(), "--disable_tqdm", "true"]

    def command(name, words):
        return with_output([*arguments, *words.split()], folder / name)

    def interrupted(finished, name):
        """Make the folder of a run that was killed in its second epoch, after the first of its three steps."""
        shutil.copytree(folder / finished / "checkpoint-4", folder / name / "checkpoint-4")

    one = f"{COMPARABLE} --gradient_accumulation_steps 6"
    two = f"{COMPARABLE} --gradient_accumulation_steps 3"
    records = {"one": [recorded_run(command("one", one))]}
    interrupted("one", "two_after_one")
    launched = {
        "two": two,
        "two_after_one": f"{two} --resume_from_checkpoint true",
        "batch_norm": "",
        "bfloat16": "--bf16 true --num_train_epochs 1",
    }
    if not RESUMES_ON_CPUS:
        del launched["two_after_one"]
    launched = {name: [str(word) for word in command(name, words)] for name, words in launched.items()}
    (folder / "runs.json").write_text(json.dumps(launched), encoding="utf-8")
    script = [ROOT / "tests/recorded_runs.py", folder]
    config = ROOT / "examples/accelerate/cpu_two_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *script]
    done = subprocess.run(
        [*map(str, launch)],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])},
        cwd=folder,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == len(launched)  # of one process each
    for name in (*launched, "several_labels"):
        records[name] = [
            json.loads((folder / f"{name}-{rank}.json").read_text(encoding="utf-8"))
            | {"tensors": load_file(folder / f"{name}-{rank}.safetensors")}
            for rank in range(2)
        ]
    interrupted("two", "one_after_two")
    records["one_after_two"] = [recorded_run(command("one_after_two", f"{one} --resume_from_checkpoint true"))]
    interrupted("two", "other_steps")
    records["other_steps"] = [recorded_run(command("other_steps", f"{two} --resume_from_checkpoint true"))]
    records["folder"] = folder
    return records


def images_by_step(records):
    steps = {}
    for step, image in [pair for record in records for pair in record["images"]]:
        steps.setdefault(step, []).append(image)
    return {step: sorted(images) for step, images in steps.items()}


def assert_same_weights(found, expected):
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


@pytest.mark.slow
def test_two_processes_share_out_the_images_that_one_sees(runs):
    one, two = images_by_step(runs["one"]), images_by_step(runs["two"])
    # Two epochs of 64 images. The last step of each has two batches to accumulate, not three.
    assert [len(set(images)) for images in one.values()] == [24, 24, 16] * 2
    assert two == one
    first, second = (images_by_step([record]) for record in runs["two"])
    for step, images in first.items():
        assert len(images) == len(second[step]) == len(one[step]) / 2
        assert not set(images) & set(second[step])


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one_that_sees_the_same_images(runs):
    assert_same_weights(runs["two"][0], runs["one"][0])
    for name, tensor in runs["two"][0]["tensors"].items():
        assert torch.equal(runs["two"][1]["tensors"][name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_after_two", "two_after_one"])
def test_a_run_goes_on_in_another_number_of_processes(runs, name):
    if name not in runs:
        pytest.skip("Transformers before 5.18 cannot resume in several processes on CPUs")
    whole = images_by_step(runs["one"])
    assert images_by_step(runs[name]) == {step: images for step, images in whole.items() if step >= 4}
    assert_same_weights(runs[name][0], runs["one"][0])


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_steps(runs):
    assert re.match(
        r"`gradient_accumulation_steps` must leave .* about 3, but got 3, .* 6 in", runs["other_steps"][0]["error"]
    )
    assert runs["other_steps"][0]["images"] == []


@pytest.mark.slow
def test_losses_of_several_labels_are_not_multiplied(runs):
    one = several_labels(4)
    assert_same_weights(runs["several_labels"][0], one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_norm", "bfloat16"])
def test_processes_hold_and_save_the_same_and_one_process_loads_it(runs, name):
    first, second = (record["tensors"] for record in runs[name])
    assert len([tensor for tensor in first if "running_" in tensor]) == 18
    for tensor, value in first.items():
        assert torch.equal(second[tensor], value), f"{tensor} differs between the processes"
    assert {record["precision"] for record in runs[name]} == {"bf16" if name == "bfloat16" else "no"}
    folder = runs["folder"] / name
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    loaded = AutoPeftModel.from_pretrained(str(folder)).state_dict()
    for file in (folder / "adapter_model.safetensors", last / "adapter_model.safetensors"):
        saved = load_file(file)
        assert saved.keys() == {f"base_model.model.{n.removeprefix('base_model.model.')}" for n in first}
        for tensor, value in first.items():
            own = "base_model.model." + tensor.removeprefix("base_model.model.")
            assert saved[own].dtype == (torch.int64 if "num_batches" in own else torch.float32)
            assert torch.equal(saved[own], value), f"{own} was saved differently"
    found = {n.replace(".default.", "."): value for n, value in loaded.items() if "pgn_" in n}
    assert found.keys() == first.keys()
    assert all(torch.equal(found[tensor], value) for tensor, value in first.items())


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_the_configs(file):
    config = load_config_from_file(str(file))
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "x.py"])
    )
    assert arguments.multi_gpu
    assert (arguments.num_processes, arguments.num_machines) == {
        "cpu_two_processes.yaml": (2, 1),
        "one_machine_gpus.yaml": (8, 1),
        "several_machines.yaml": (64, 8),
    }[file.name]
    assert arguments.mixed_precision == ("no" if config.use_cpu else "bf16")


def test_processes_that_each_believe_themselves_alone_are_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = TrainingArguments(tmp_path, report_to="none")
    with pytest.raises(ValueError, match="`use_cpu` must be given .* but got False in 2 processes .* Add --use_cpu"):
        AdapterTrainer(get_peft_model(tiny_vit(), tiny_config()), arguments)


def test_broadcasting_in_a_single_process_does_nothing():
    model = get_peft_model(tiny_vit(), tiny_config())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    broadcast_statistics(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_models_sharded_over_two_processes_train_the_adapters_of_one(sharding, tmp_path):
    if sharding == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/sharded_training.py"), str(tmp_path), sharding]
    subprocess.run([*launcher, *script], env=ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}, check=True, timeout=HANG)
    for kind in sharded_training.KINDS:
        alone = sharded_training.train_kind(kind, sharded_training.with_fsdp2)
        assert_same_weights({"tensors": torch.load(tmp_path / f"{kind}.pt")}, {"tensors": alone})
