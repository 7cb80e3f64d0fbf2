"""Processes that are killed, disks that are full or read-only, two writers of one folder. See `faults.py`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import train_image_classifier
from fault_files import Material, classify, equal, logits, prompt
from fault_outcomes import REFUSED, RIGHT, WRONG, Tally, judge
from image_data import smoke_arguments
from peft import PeftModel
from safetensors.torch import load_file

from pgn_peft import Classifier, make_prompter
from pgn_peft.training import last_complete_checkpoint

Outcome = tuple[str, str]
REPOSITORY = "user/adapter"


def fork(act: Callable[[], Any], log: Path) -> int:
    """Run something in a process of its own, which ends with status 1 where it raises; return the process's id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            act()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Wait for a process's end, and return its status; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """Kill a process, and say whether it was running still."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(min(0.001, seconds))
    os.kill(child, signal.SIGKILL)
    wait(child)
    return True


def last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing was said"


def one_of(found: Any, candidates: list[Any]) -> bool:
    return any(equal(found, candidate) for candidate in candidates)


# Two adapters that differ in everything, and what they answer.


class Pair:
    """Two adapters and two prompters that take each other's place.

    Args:
        material: the models.
    """

    def __init__(self, material: Material) -> None:
        self.material = material
        processors = [material.processor, type(material.processor)(size={"height": 32, "width": 32})]
        self.classifiers = [
            Classifier(material.adapted(form, seed=3), processor)
            for form, processor in zip(("generated", "pixel"), processors, strict=True)
        ]
        self.prompters = [make_prompter(material.adapted("pixel", seed), material.processor) for seed in (3, 4)]
        folder = material.root / "pair"
        self.answers, self.logits, self.prompted = [], [], []
        for classifier, prompter in zip(self.classifiers, self.prompters, strict=True):
            classifier.save_pretrained(folder)
            prompter.save_pretrained(folder)
            self.answers.append(classify(folder))
            self.logits.append(logits(PeftModel.from_pretrained(material.base(), folder)))
            self.prompted.append(prompt(folder))

    def save(self, index: int, folder: Path) -> None:
        """Save one of the adapters."""
        self.classifiers[index].save_pretrained(folder)

    def save_as_peft_does(self, index: int, folder: Path) -> None:
        """Save one of the adapters as PEFT does, file by file in place."""
        self.classifiers[index].model.save_pretrained(folder)

    def save_prompter(self, index: int, folder: Path) -> None:
        """Save one of the prompters."""
        self.prompters[index].save_pretrained(folder)

    def load(self, folder: Path) -> Outcome:
        """Load the adapter in two ways: both must give one of the two adapters, and the same."""
        outcome = judge(lambda: classify(folder), lambda found: one_of(found, self.answers))
        if outcome[0] != RIGHT:
            return outcome
        return self.load_with_peft(folder)

    def load_with_peft(self, folder: Path) -> Outcome:
        """Load the adapter with PEFT: it must be one of the two."""
        base = self.material.base()
        return judge(lambda: logits(PeftModel.from_pretrained(base, folder)), lambda found: one_of(found, self.logits))

    def load_prompter(self, folder: Path) -> Outcome:
        """Load the prompter: it must be one of the two."""
        return judge(lambda: prompt(folder), lambda found: one_of(found, self.prompted))


def nothing_lost(outcome: Outcome) -> Outcome:
    """Count a refusal as wrong: after an interruption what was saved before must load."""
    return (WRONG, f"lost: {outcome[1]}") if outcome[0] != RIGHT else outcome


# kill -9.


def kills(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Kill training, saving and pushing at random moments, and saving before each of its file operations."""
    rng = random.Random(seed)
    pair = Pair(material)
    for save, load, row in (
        (pair.save, pair.load, "saving an adapter"),
        (pair.save_prompter, pair.load_prompter, "saving a prompter"),
    ):
        for index in range(10 * cases):
            tally.add(row, f"kill {index}", kill_saving(save, load, material.root / "saved", rng.uniform(0, 0.03)))
        row += ", before its n-th file operation"
        for place in range(1000):
            finished, outcome = kill_at_operation(save, load, material.root / "saved", place)
            tally.add(row, f"operation {place}", outcome)
            if finished:
                break
    for index in range(10 * cases):
        outcome = kill_saving(
            pair.save_as_peft_does, pair.load_with_peft, material.root / "saved", rng.uniform(0, 0.03)
        )
        tally.add("PEFT's `save_pretrained` over an earlier adapter", f"kill {index}", outcome, guarded=False)
    kill_pushing(tally, material, cases, rng)
    kill_training(tally, material, cases, rng)


def kill_saving(save: Callable, load: Callable[[Path], Outcome], folder: Path, seconds: float) -> Outcome:
    """Kill a process that saves again and again; then load, save, and load again."""
    shutil.rmtree(folder, ignore_errors=True)
    save(0, folder)

    def act() -> None:
        for index in range(1, 10**6):
            save(index % 2, folder)

    kill_after(fork(act, folder.with_suffix(".log")), seconds + 0.005)
    outcome = nothing_lost(load(folder))
    save(1, folder)
    again = load(folder)
    return outcome if again[0] == RIGHT else (WRONG, f"after the next save: {again[1]}")


def kill_at_operation(
    save: Callable, load: Callable[[Path], Outcome], folder: Path, place: int
) -> tuple[bool, Outcome]:
    """Kill a save before its n-th file operation; say whether it had fewer, and what can be loaded."""
    shutil.rmtree(folder, ignore_errors=True)
    save(0, folder)

    def act() -> None:
        left = place

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event.startswith(("os.", "open", "shutil.", "tempfile.")) and str(folder) in str(arguments):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(count)
        save(1, folder)

    finished = wait(fork(act, folder.with_suffix(".log"))) == 0
    return finished, nothing_lost(load(folder))


def kill_pushing(tally: Tally, material: Material, cases: int, rng: random.Random) -> None:
    """Kill a process that pushes again and again to a Hub in this process; the Hub must hold a whole adapter."""
    hub = material.hub
    hub.put("user/base", material.root / "base")
    pair = Pair(material)
    for classifier in pair.classifiers:
        classifier.model.peft_config["default"].base_model_name_or_path = "user/base"
    pair.classifiers[0].push_to_hub(REPOSITORY)

    def act() -> None:
        for index in range(1, 10**6):
            pair.classifiers[index % 2].push_to_hub(REPOSITORY)

    for index in range(cases):
        before = len(hub.repositories[REPOSITORY].log)
        kill_after(fork(act, material.root / "push.log"), rng.uniform(0.01, 1))
        folder = material.root / "pulled"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in hub.repositories[REPOSITORY]:
            (folder / name).write_bytes(hub.content(REPOSITORY, name))
        outcome = nothing_lost(pair.load(folder))
        tally.add("pushing", f"kill {index}, {len(hub.repositories[REPOSITORY].log) - before} pushes", outcome)


def training(material: Material) -> list[str]:
    """Return the command line of a short training run, with three checkpoints an epoch."""
    folder = material.root / "training"
    command = json.loads((folder / "command.json").read_text(encoding="utf-8")) if folder.exists() else None
    if command is None:
        folder.mkdir()
        command = smoke_arguments(folder)
        command[command.index("--augmentation") + 1] = "none"
        command += ["--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "3", "--eval_steps", "3"]
        command += ["--disable_tqdm", "true", "--num_train_epochs", "2"]
        (folder / "command.json").write_text(json.dumps(command), encoding="utf-8")
    return command


def train(material: Material, output: Path, *more: str) -> Callable[[], Any]:
    command = training(material)
    command[command.index("--output_dir") + 1] = str(output)
    return lambda: train_image_classifier.main([*command, *more])


def finished_run(material: Material) -> tuple[dict[str, torch.Tensor], float]:
    """Run training to its end, and return the adapter's weights and the seconds that it took."""
    output = material.root / "finished"
    wait(
        fork(train(material, material.root / "first"), material.root / "run.log")
    )  # which fills the cache of datasets
    start = time.monotonic()
    status = wait(fork(train(material, output), material.root / "run.log"))
    if status:
        raise RuntimeError(f"training failed: {last_error(material.root / 'run.log')}")
    return load_file(output / "adapter_model.safetensors"), time.monotonic() - start


def kill_training(tally: Tally, material: Material, cases: int, rng: random.Random) -> None:
    """Kill training that writes to a folder with an earlier adapter; the adapter must load, the run must go on."""
    expected, seconds = finished_run(material)
    pair = Pair(material)
    final = classify(material.root / "finished")
    output, log = material.root / "killed", material.root / "run.log"
    for index in range(cases):
        shutil.rmtree(output, ignore_errors=True)
        pair.save(0, output)
        (output / "results.json").write_text('{"earlier": true}', encoding="utf-8")
        place = rng.uniform(0, seconds)
        killed = kill_after(fork(train(material, output), log), place)
        outcome = after_kill(pair, output, final)
        if outcome[0] == RIGHT:
            status = wait(fork(train(material, output, "--resume_from_checkpoint", "true"), log))
            outcome = (RIGHT, "") if status == 0 else (WRONG, f"resuming failed: {last_error(log)}")
        if outcome[0] == RIGHT:
            found = load_file(output / "adapter_model.safetensors")
            if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in found):
                outcome = (WRONG, "other weights than those of an uninterrupted run")
        tally.add("training, then resumed", f"kill {index} after {place:.2f} s ({killed})", outcome)


def after_kill(pair: Pair, output: Path, final: torch.Tensor) -> Outcome:
    """Look for the earlier adapter or the run's, for one of the two results, and for the last checkpoint."""
    outcome = nothing_lost(judge(lambda: classify(output), lambda found: one_of(found, [pair.answers[0], final])))
    if outcome[0] != RIGHT:
        return outcome
    json.loads((output / "results.json").read_text(encoding="utf-8"))
    # Trainer writes this file last.
    complete = [file.parent for file in output.glob("checkpoint-*/trainer_state.json") if file.stat().st_size]
    if len(complete) > 1 and last_complete_checkpoint(output) is None:
        return WRONG, f"no checkpoint is complete of {complete}"
    return outcome


# Full disks, read-only folders.


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """Mount a small disk in memory; False where that is not permitted."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """Fill a disk up to some bytes."""
    file = folder / "filler"
    file.write_bytes(b"")
    with contextlib.suppress(OSError), file.open("wb") as output:
        output.write(bytes(max(0, shutil.disk_usage(folder).free - left)))
    return file


def full_disks(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Save where the disk has room for a part, or where files may have some bytes only; train until it is full."""
    rng = random.Random(seed)
    pair = Pair(material)
    disk, log = material.root / "disk", material.root / "disk.log"
    savers = [("an adapter", pair.save, pair.load), ("a prompter", pair.save_prompter, pair.load_prompter)]
    for what, save, load in savers:
        for _ in range(cases):
            folder, limit = material.root / "limited", rng.randrange(1000, 200_000)
            shutil.rmtree(folder, ignore_errors=True)
            save(0, folder)

            def act(save: Callable = save, folder: Path = folder, limit: int = limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                save(1, folder)

            outcome = afterwards(in_child(act, log, str(folder)), nothing_lost(load(folder)))
            tally.add(f"saving {what}, files limited to some bytes", f"{limit} bytes", outcome)
    with small_disk(disk, "1m") as mounted:
        if not mounted:
            print("not permitted to mount a small disk: left out")
            return
        for what, save, load in savers:
            for _ in range(cases):
                folder = disk / "saved"
                shutil.rmtree(folder, ignore_errors=True)
                save(0, folder)
                left = rng.randrange(250_000)
                filler = fill(disk, left)
                outcome = afterwards(
                    in_child(lambda save=save, folder=folder: save(1, folder), log, str(folder)),
                    nothing_lost(load(folder)),
                )
                filler.unlink()
                tally.add(f"saving {what} on a full disk", f"{left} bytes left", outcome)
    with small_disk(disk, "32m"):
        for _ in range(max(1, cases // 4)):
            folder = disk / "run"
            shutil.rmtree(folder, ignore_errors=True)
            pair.save(0, folder)
            left = rng.randrange(14_000_000)
            filler = fill(disk, left)
            outcome = in_child(train(material, folder), log, str(folder))
            outcome = afterwards(outcome, nothing_lost(judge(lambda f=folder: classify(f), lambda _: True)))
            filler.unlink()
            if outcome[0] == REFUSED and wait(fork(train(material, folder, "--resume_from_checkpoint", "true"), log)):
                outcome = (WRONG, f"with room again, resuming failed: {last_error(log)}")
            tally.add("training on a full disk, then resumed with room", f"{left} bytes left", outcome)


def afterwards(outcome: Outcome, loaded: Outcome) -> Outcome:
    """Join what came of an action and what can be loaded afterwards."""
    return outcome if loaded[0] == RIGHT or outcome[0] == WRONG else loaded


def in_child(act: Callable[[], Any], log: Path, named: str) -> Outcome:
    """Do something in a process of its own; a refusal is clear if it names the folder."""

    def judged() -> None:
        kind, explanation = judge(act, lambda _: True)
        print(json.dumps([kind, explanation]))

    status = wait(fork(judged, log))
    if status:
        return WRONG, f"status {status}: {last_error(log)}"
    kind, explanation = json.loads(last_error(log))
    if kind == REFUSED and named not in explanation:
        return WRONG, f"not named: {explanation}"
    return kind, explanation


def read_only(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Save to a read-only disk, and as a user who may not write; load from both."""
    pair = Pair(material)
    training(material)  # another user could not make its images
    disk, log = material.root / "readonly", material.root / "readonly.log"
    acts: dict[str, Callable[[Path], Callable[[], Any]]] = {
        "saving an adapter": lambda folder: lambda: pair.save(1, folder),
        "saving into a new folder": lambda folder: lambda: pair.save(1, folder / "new"),
        "PEFT's `save_pretrained`": lambda folder: lambda: pair.save_as_peft_does(1, folder),
        "saving a configuration": lambda folder: (
            lambda: pair.classifiers[1].model.peft_config["default"].save_pretrained(str(folder))
        ),
        "saving a prompter": lambda folder: lambda: pair.save_prompter(1, folder),
        "training": lambda folder: train(material, folder),
    }

    def attempt(folder: Path, how: str, user: int | None) -> None:
        for row, act in acts.items():

            def as_user(act: Callable = act) -> None:
                if user is not None:
                    os.setuid(user)
                act(folder)()

            outcome = in_child(as_user, log, str(folder))
            if outcome[0] == RIGHT:
                outcome = (WRONG, "accepted, though nothing can be written")
            kept = [nothing_lost(pair.load(folder)), nothing_lost(pair.load_prompter(folder))]
            outcome = next((loaded for loaded in kept if loaded[0] != RIGHT), outcome)
            tally.add(row, how, outcome, guarded=not row.startswith("PEFT"))
        tally.add("loading an adapter", how, nothing_lost(pair.load(folder)))
        tally.add("loading a prompter", how, nothing_lost(pair.load_prompter(folder)))

    def prepare(folder: Path) -> None:
        pair.save(0, folder)
        pair.save_prompter(0, folder)

    if os.getuid() == 0:
        for path in (material.root, *material.root.rglob("*")):  # so that another user can read them
            path.chmod(0o755 if path.is_dir() else 0o644)
        prepare(disk / "user")
        (disk / "user").chmod(0o555)
        attempt(disk / "user", "as another user", 65534)
    with small_disk(disk, "1m") as mounted:
        if not mounted:
            print("not permitted to mount a disk: left out")
            return
        prepare(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        attempt(disk, "a read-only disk", None)


# Two processes.


def two_writers(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Start a second run while one trains; save two adapters to one folder at the same time, and load meanwhile."""
    rng = random.Random(seed)
    pair = Pair(material)
    expected, seconds = finished_run(material)
    output, log = material.root / "shared", material.root / "second.log"
    for index in range(cases):
        shutil.rmtree(output, ignore_errors=True)
        first = fork(train(material, output), material.root / "run.log")
        while not (output / ".training.lock").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds / 3))
        more = ["--resume_from_checkpoint", "true"] if index % 2 else []
        tally.add(
            "a second run in one output folder",
            f"run {index}",
            in_child(train(material, output, *more), log, str(output)),
        )
        status = wait(first)
        found = load_file(output / "adapter_model.safetensors") if status == 0 else {}
        same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        outcome = (RIGHT, "") if same else (WRONG, f"status {status}: {last_error(material.root / 'run.log')}")
        tally.add("the first run meanwhile", f"run {index}", outcome)
    for index in range(cases):
        shutil.rmtree(output, ignore_errors=True)
        pair.save(0, output)

        def act(which: int) -> Callable[[], None]:
            def save() -> None:
                for _ in range(20):
                    pair.save(which, output)

            return save

        children = [fork(act(which), material.root / f"writer{which}.log") for which in (0, 1)]
        for _ in range(5):
            tally.add("loading while two processes save", f"round {index}", pair.load(output))
        failed = [child for child in children if wait(child)]
        outcome = nothing_lost(pair.load(output))
        if failed:
            outcome = (WRONG, last_error(material.root / f"writer{children.index(failed[0])}.log"))
        tally.add("two processes that save to one folder", f"round {index}", outcome)
