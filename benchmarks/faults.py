"""Damage files, kill processes, fill disks, and count what comes of it.

    python benchmarks/faults.py --campaign adapters json names images
    python benchmarks/faults.py --campaign kill disk readonly two_writers

Everything runs on a tiny ViT, and follows from `--seed`. The table has for each way to load or save how many cases
were refused with a message that names a file or a field, refused by PEFT, Transformers or another library before our
code was asked, accepted with the results of undamaged files, or none of these: wrong. Wrong ones are listed, and make
the exit status 1. A second table has what our code does not get to see. The campaigns:

- adapters: bytes flipped, cut out, inserted, overwritten in an adapter's and a prompter's files (1000 cases)
- json: each field of the JSON files with values of other types
- names: path tricks wherever a name goes
- images: all of Pillow's modes, sides of 1 to 10,000, files cut at every tenth
- kill: kill -9 at random moments of training, saving, pushing
- disk: a full one. readonly: a folder that cannot be written to. two_writers: two processes with one output folder

`--smoke`: a few cases of each, in about a minute. Linux; a full disk and a read-only folder need root, and are skipped
otherwise.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]

from loopback_hub import LoopbackHub, loopback_hub  # noqa: E402

# Before huggingface_hub is imported, which reads its address then: a Hub in this process, and no other.
SERVER = loopback_hub()
HUB: LoopbackHub = SERVER.__enter__()
atexit.register(SERVER.__exit__, None, None, None)
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="faults-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import torch  # noqa: E402
import transformers  # noqa: E402
from fault_files import Material, damaged_files, other_types, path_tricks  # noqa: E402
from fault_images import all_images  # noqa: E402
from fault_outcomes import Tally, table  # noqa: E402
from fault_processes import full_disks, kills, read_only, two_writers  # noqa: E402

# campaign -> function, cases, cases with --smoke
CAMPAIGNS: dict[str, tuple[Callable[[Tally, Material, int, int], None], int, int]] = {
    "adapters": (damaged_files, 1000, 32),
    "json": (other_types, 10**6, 40),
    "names": (path_tricks, 10**6, 40),
    "images": (all_images, 10**6, 12),
    "kill": (kills, 20, 1),
    "disk": (full_disks, 20, 2),
    "readonly": (read_only, 1, 1),
    "two_writers": (two_writers, 10, 1),
}


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaign", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--cases", type=int, help="of each campaign; by default those of docs/reliability.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few cases of each")
    options = parser.parse_args(command_line)
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    wrong = 0
    for name in options.campaign:
        campaign, cases, few = CAMPAIGNS[name]
        tally, start = Tally(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            campaign(
                tally, Material(Path(folder), HUB), options.cases or (few if options.smoke else cases), options.seed
            )
        print(f"\n{name}, seed {options.seed}, {time.monotonic() - start:.0f} s\n\n{table(tally.counts)}")
        if tally.unguarded:
            print(f"\nnot seen by our code:\n\n{table(tally.unguarded)}")
        for words, count in tally.words.most_common(10):
            print(f"by a library, {count} times: {words}")
        for line in tally.wrong:
            print(f"WRONG {line}")
        wrong += len(tally.wrong)
    print(f"\nwrong: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
