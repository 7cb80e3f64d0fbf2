"""Pictures of one of the adapters that `adaptation.py` has trained, on validation images.

    python benchmarks/pictures.py --model path/to/deit-tiny-patch16-224 --data digits --rate 0.003 --plots docs/images

The run is repeated if its weights are missing (they are kept until it is tested). `--smoke`: a tiny model on generated
images, in seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench
from adaptation import Cell, build, material_of, run, state_file
from plotting import (
    plot_attention,
    plot_coefficients,
    plot_images_by_entry,
    plot_library,
    plot_usage,
)
from smoke_material import smoke_arguments

from pgn_peft.inspection import attention_to_prompts, library_tokens, mixing_coefficients, usage_by_class


def draw(results: bench.Results, cell: Cell, folder: Path) -> list[Path]:
    """Draw an adapter into a folder, and return the files."""
    if not state_file(results, cell).is_file():
        run(results, cell)
    material = material_of(cell)
    adapted, _ = build(cell)
    adapted.load_state_dict(load_file(state_file(results, cell), device=str(bench.DEVICE)), strict=False)
    model, images = adapted.model.eval(), material.splits["validation"]
    pixel_values = material.normalized(images.pixels)
    coefficients = mixing_coefficients(model, pixel_values)
    usage = usage_by_class(coefficients, images.labels.cpu(), len(material.names))

    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "images-by-entry": plot_images_by_entry(images.pixels.cpu() / 255, coefficients, entries=5, images=10),
        "usage": plot_usage(usage, material.names).figure,
        "coefficients": plot_coefficients(coefficients[0]).figure,
        "library": plot_library(library_tokens(model), usage).figure,
        "attention": plot_attention(attention_to_prompts(model, pixel_values[:100])).figure,
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=90)
    plt.close("all")
    return [folder / f"{name}.png" for name in figures]


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="'digits', a folder or an id")
    parser.add_argument("--model", help="id or path of a ViT")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="outputs/adaptation.jsonl", help="the file beside which weights are kept")
    parser.add_argument("--plots", type=Path, default=Path("outputs/pictures"), help="folder to draw into")
    parser.add_argument("--threads", type=int, help="of this process; by default all cores")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on generated images, in seconds")
    options = parser.parse_args(command_line)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            smoke_arguments(Path(folder))
            options.data, options.model = f"{folder}/images", f"{folder}/vit"
            options.results, options.plots = f"{folder}/results.jsonl", Path(folder) / "pictures"
        if not (options.data and options.model):
            parser.error("--data and --model are required")
        protocol = "smoke" if options.smoke else "small"
        cell = Cell(options.data, options.model, "pgn", options.rate, options.seed, protocol)
        for file in draw(bench.Results(options.results), cell, options.plots):
            print(f"{file.name}: {file.stat().st_size / 1000:.3f} kB")


if __name__ == "__main__":
    main()
