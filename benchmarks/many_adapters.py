"""Load, activate and delete an adapter repeatedly: milliseconds, and memory that is not released.

    python benchmarks/many_adapters.py --rounds 1000

On a tiny ViT, so that the adapter's cost is measured; LoRA through PEFT for comparison. Memory is the process's
resident set after the garbage collector has run, from the 20th round on. safetensors keeps a few bytes for each tensor
that it reads, for either method; PGN's adapters have sixty tensors and LoRA's on this model eight. `--smoke`: 30
rounds.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from pgn_peft import PGNConfig

SETTLED = 20  # rounds until caches are full
CONFIGS = {
    "PGN": PGNConfig(num_virtual_tokens=4, library_size=8, generator_image_size=None, generator_width=4, num_labels=2),
    "LoRA": LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
}


def tiny_vit() -> ViTForImageClassification:
    """Make a two-layer ViT of width 32."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes))


def resident() -> float:
    """Return the process's resident set in KiB (Linux)."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return float(line.split()[1])


def measure(config: PeftConfig, rounds: int) -> tuple[dict[str, float], float]:
    """Return milliseconds of each operation, and KiB a round that did not come back."""
    seconds = dict.fromkeys(("load", "activate", "delete"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(tiny_vit(), config).save_pretrained(folder)
        model = PeftModel.from_pretrained(tiny_vit(), folder, adapter_name="first")
        before = 0.0
        for index in range(SETTLED + rounds):
            if index == SETTLED:
                seconds, before = dict.fromkeys(seconds, 0.0), resident()
            name = f"adapter{index}"
            start = time.process_time()
            model.load_adapter(folder, adapter_name=name)
            loaded = time.process_time()
            model.set_adapter(name)
            active = time.process_time()
            model.set_adapter("first")
            back = time.process_time()
            model.delete_adapter(name)
            seconds["load"] += loaded - start
            seconds["activate"] += active - loaded
            seconds["delete"] += time.process_time() - back
    return {name: 1000 * spent / rounds for name, spent in seconds.items()}, (resident() - before) / rounds


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="30 rounds")
    options = parser.parse_args(command_line)
    torch.set_num_threads(1)
    for name, config in CONFIGS.items():
        milliseconds, grown = measure(config, 30 if options.smoke else options.rounds)
        figures = ", ".join(f"{operation} {spent:.3f} ms" for operation, spent in milliseconds.items())
        print(f"{name}: {figures}; memory a round {grown:.3f} KiB")


if __name__ == "__main__":
    main()
