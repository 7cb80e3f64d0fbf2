"""Checks of single values, with messages that name the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pgn_peft.preprocessing import PILLOW_MODES

if TYPE_CHECKING:
    from pgn_peft.config import PGNConfig


def check_integer(name: str, value: Any, minimum: int, maximum: int, optional: bool = False) -> int | None:
    """Return `value` as an int in minimum..maximum, or None where `optional`.

    Raises:
        TypeError: it is no integer.
        ValueError: it lies outside.
    """
    if optional and value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, but got {value!r}. Use a whole number of at least {minimum}.")
    if not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must lie in {minimum}..{maximum}, but got {value!r}. Use a number in this range.")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of the strings `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, but got {value!r}. Choose one of {', '.join(choices)}.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {value!r}. Choose one of these.")


def check_boolean(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, but got {value!r}. Write one of these.")


def check_text(name: str, value: Any) -> None:
    """Raise unless `value` is a string or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, but got {value!r}. Leave it out if there is none.")


def check_texts(name: str, value: Any) -> None:
    """Raise unless `value` is a dictionary of strings, or None."""
    if value is not None and not (
        isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)
    ):
        raise TypeError(
            f"`{name}` must be a dictionary of strings, but got {value!r}. It is recorded when an adapter is made."
        )


def check_scale(name: str, value: Any, official: str, zero: bool = False) -> None:
    """Raise unless `value` is a number above 0, or 0 where `zero`, and at most 1000."""
    remedy = f"The official code uses {official}."
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, but got {value!r}. {remedy}")
    if not (0 < value <= 1000 or (zero and value == 0)):
        bound = "" if zero else ", above 0"
        raise ValueError(f"`{name}` must lie in 0..1000{bound}, but got {value!r}. {remedy}")


def check_processor(settings: Mapping[str, Any]) -> None:
    """Check the fields of an image processor's file. Transformers takes any text for True, and True for a number.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.
    """
    for name, value in settings.items():
        if value is None:
            continue
        if name.startswith("do_"):
            check_boolean(name, value)
        elif name in ("image_mean", "image_std"):
            check_channel_values(name, value if isinstance(value, list) else [value], positive=name == "image_std")
        elif name == "rescale_factor":
            check_scale(name, value, "1/255")
        elif name == "resample":
            check_integer(name, value, 0, 5)
        elif name in ("size", "crop_size"):
            for side in value.values() if isinstance(value, Mapping) else [value]:
                check_integer(name, side, 1, 65_536, optional=True)


def check_pair(name: str, value: Any, maximum: int) -> tuple[int, int]:
    """Return a list of two integers in 1..maximum as a tuple.

    Raises:
        TypeError: it is none.
        ValueError: one lies outside.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"`{name}` must be a list of two integers, but got {value!r}. Write both.")
    return check_integer(name, value[0], 1, maximum), check_integer(name, value[1], 1, maximum)


def check_channel_values(name: str, value: Any, positive: bool) -> list[float]:
    """Return one finite number per channel, above 0 where `positive`.

    Raises:
        TypeError: it is no list of numbers.
        ValueError: it is empty, or a number is impossible.
    """
    remedy = f"Copy it from the image processor: processor.{name}."
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(number, Real) and not isinstance(number, bool) for number in value
    ):
        raise TypeError(f"`{name}` must be a list with a number for each channel, but got {value!r}. {remedy}")
    numbers = [float(number) for number in value]
    smallest = 1e-6 if positive else -1000.0
    if not numbers or not all(smallest <= number <= 1000.0 for number in numbers):
        bound = "above 0" if positive else "finite"
        raise ValueError(f"`{name}` must hold {bound} numbers, one a channel, but got {value!r}. {remedy}")
    return numbers


def check_indices(name: str, value: Any) -> list[int]:
    """Return a list of different integers of at least 0.

    Raises:
        TypeError: it is no list of integers.
        ValueError: it is empty, an integer is negative, or one comes twice.
    """
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(index, Integral) and not isinstance(index, bool) for index in value
    ):
        raise TypeError(f"`{name}` must be a list of class indices, but got {value!r}. See `frequency_mapping`.")
    indices = [int(index) for index in value]
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if not indices or min(indices) < 0 or twice:
        found = f"{twice} more than once" if twice else repr(value)
        raise ValueError(
            f"`{name}` must give each of the adapter's classes one of the model's, all different, but got {found}. "
            "`frequency_mapping` makes such a list."
        )
    return indices


def check_names(name: str, value: Any) -> list[str] | None:
    """Return a list of module names, given as such or as one string; None stays.

    Raises:
        TypeError: it is neither.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(item, str) and item for item in names):
        raise TypeError(f"`{name}` must be a list of module names, but got {value!r}. Give names as strings.")
    return sorted(names) if isinstance(names, set) else list(names)


def check_one_name(name: str, value: Any) -> list[str] | None:
    """Return a list of exactly one module name; None stays.

    Raises:
        TypeError: it is no name.
        ValueError: it is several names, or none.
    """
    names = check_names(name, value)
    if names is not None and len(names) != 1:
        raise ValueError(
            f"`{name}` must name one module, the embeddings, but got {value!r}. Prompts are added in one place; leave "
            "it out for a supported architecture."
        )
    return names


def refuse_head_in_modules_to_save(name: str) -> None:
    """Raise, saying why the classification head does not belong into `modules_to_save`."""
    raise ValueError(
        f"`modules_to_save` must not name the classification head, but got {name!r}. A PGN adapter owns its head, "
        "trains and saves it, and can give it labels of its own; a head in `modules_to_save` could not be loaded on a "
        "model with another number of labels. Leave it out; head='frozen' keeps the model's head as it is."
    )


def check_pixel_values(pixel_values: Any, num_channels: int, image_size: tuple[int, int] | None) -> None:
    """Check shape and dtype of what a backbone is called with.

    Args:
        pixel_values: (B, C, H, W), floating point, if all is well.
        num_channels: channels C that the backbone takes.
        image_size: height and width that it takes, in pixels; None: any.

    Raises:
        TypeError: it is no floating-point tensor.
        ValueError: it has the wrong number of axes, channels or pixels.
    """
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"`pixel_values` must be a tensor (B, C, H, W), but got {type(pixel_values).__name__}. Run the image "
            "processor first: processor(images=..., return_tensors='pt')."
        )
    shape = tuple(pixel_values.shape)
    if len(shape) != 4:
        raise ValueError(
            f"`pixel_values` must have the four axes (B, C, H, W), but got shape {shape}. "
            "Add the batch axis to a single image: pixel_values[None]."
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"`pixel_values` must be normalised floating-point images, but got {pixel_values.dtype}, which looks "
            "like pixels in 0..255. Run the image processor first."
        )
    if shape[1] != num_channels:
        mode = PILLOW_MODES.get(num_channels, "...")
        raise ValueError(
            f"`pixel_values` must have {num_channels} channels, as the backbone does, but got {shape[1]} in "
            f"shape {shape}. Convert the images, e.g. image.convert({mode!r})."
        )
    if image_size is not None and shape[2:] != image_size:
        raise ValueError(
            f"`pixel_values` must measure {image_size[0]} x {image_size[1]} pixels, as the backbone expects, but got "
            f"{shape[2]} x {shape[3]}. Resize the images, or pass interpolate_pos_encoding=True."
        )


def check_together(adapter_names: Sequence[str], configs: Mapping[str, PGNConfig]) -> None:
    """Refuse adapters that cannot be active at the same time.

    Raises:
        ValueError: more than one lays patches into the image, or one of several changes its prompts in each layer.
    """
    in_pixels = [name for name in adapter_names if configs[name].prompt_space == "pixel"]
    if len(in_pixels) > 1:
        raise ValueError(
            f"`adapter_name` must name one adapter in pixel space at most, but got {', '.join(in_pixels)}: both would "
            "lay their patches into the same image. Activate one of them."
        )
    deep = next((name for name in adapter_names if configs[name].prompt_depth != 1), None)
    if deep is not None and len(adapter_names) > 1:
        raise ValueError(
            f"`adapter_name` must name no other adapter beside {deep!r}, which has prompts in several layers, but got "
            f"{', '.join(adapter_names)}: their prompts would take each other's place. Activate one of them."
        )
