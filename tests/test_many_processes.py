"""Two processes train as one does that sees the same images, and hold and save the same adapter."""

import subprocess
import sys

import pytest
import sharded_training
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ENVIRONMENT, HANG, ROOT
from recorded_runs import PROBLEMS, run
from safetensors.torch import load_file

CONFIGS = sorted(ROOT.joinpath("examples/accelerate").glob("*.yaml"))
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with what each of two processes holds after each run."""
    folder = tmp_path_factory.mktemp("runs")
    script = [str(ROOT / "tests/recorded_runs.py"), str(folder)]
    subprocess.run([*LAUNCHER, *script], env=ENVIRONMENT, check=True, timeout=HANG, cwd=folder)
    return folder


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_processes_reach_the_weights_and_the_loss_of_one(problem, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_same_weights(load_file(runs / f"{problem}-0.safetensors"), run(problem, 4))


@pytest.mark.slow
def test_processes_hold_and_save_the_same_statistics(runs):
    first, second = (load_file(runs / f"batch_norm-{rank}.safetensors") for rank in range(2))
    saved = load_file(runs / "run/checkpoint-2/adapter_model.safetensors")
    assert len([name for name in first if "running_" in name]) == 18
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), f"{name} differs between the processes"
        assert torch.equal(saved[f"base_model.model.{name.removeprefix('base_model.model.')}"], tensor), name


def test_accelerate_reads_the_configs():
    processes = {"cpu_two_processes.yaml": (2, 1), "one_machine_gpus.yaml": (8, 1), "several_machines.yaml": (64, 8)}
    assert {file.name for file in CONFIGS} == processes.keys()
    for file in CONFIGS:
        config = load_config_from_file(str(file))
        command = launch_command_parser().parse_args(["--config_file", str(file), "x.py"])
        arguments, _, _ = _validate_launch_command(command)
        assert arguments.multi_gpu
        assert (arguments.num_processes, arguments.num_machines) == processes[file.name]
        assert arguments.mixed_precision == ("no" if config.use_cpu else "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_models_sharded_over_two_processes_train_the_adapters_of_one(sharding, tmp_path):
    if sharding == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    script = [str(ROOT / "tests/sharded_training.py"), str(tmp_path), sharding]
    subprocess.run([*LAUNCHER, *script], env=ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}, check=True, timeout=HANG)
    for kind in sharded_training.KINDS:
        alone = sharded_training.train_kind(kind, sharded_training.with_fsdp2)
        assert_same_weights(torch.load(tmp_path / f"{kind}.pt"), alone)
