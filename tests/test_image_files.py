"""Image files: found in folders, opened as upright 8-bit images, and named where they cannot be."""

import io

import numpy as np
import PIL
import pytest
from image_files import check_image, is_image_file, list_files, open_image
from packaging.version import Version
from PIL import Image

GREY = np.arange(256, dtype=np.uint16).reshape(16, 16)  # of 8 bits, stored with more


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(side=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_files_are_found_in_linked_folders_of_any_name(tmp_path):
    folder = tmp_path / "we[i]rd *dir?"
    for name in ("b/1.png", "b/deep/2.JPG", "a]/0.webp", "a]/notes.txt", ".git/3.png", "b/._1.png", "__MACOSX/4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/5.png").touch()
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "b/loop").symlink_to(folder)
    (folder / "b/gone.png").symlink_to(tmp_path / "nowhere")
    files = list_files(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    assert names == ["a]/0.webp", "a]/notes.txt", "b/1.png", "b/deep/2.JPG", "b/gone.png", "c/5.png"]
    assert [file.name for file in files if not is_image_file(file)] == ["notes.txt"]


def test_16_bit_files_are_scaled(tmp_path):
    file = tmp_path / "image"
    kinds = ["PNG", "TIFF", "JPEG2000"]
    if Version(PIL.__version__) > Version("10.4"):  # which writes no such file
        kinds.append("PPM")
    for kind in kinds:
        file.write_bytes(encode(Image.fromarray(GREY * 257), kind))
        for source in (file, file.read_bytes()):
            image = open_image(source)
            assert image.mode == "RGB", kind
            assert np.array_equal(np.array(image)[..., 1], GREY), kind
            check_image(source)


def test_a_tiff_file_of_12_bits_is_scaled_by_them():
    pixels = np.array([0, 4095, 2048, 100])
    packed = bytes([0, 15, 255, 128, 0, 100])  # two pixels in three bytes
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(np.array([tag, 4, 1, 0, value, 0], "<u2").tobytes() for tag, value in tags.items())
    image = open_image(b"II*\0\10\0\0\0" + np.uint16(len(tags)).tobytes() + entries + bytes(4) + packed, "L")
    assert np.array_equal(np.array(image)[0], np.round(pixels / 4095 * 255))


def test_floats_in_the_range_of_images_are_scaled(tmp_path):
    content = encode(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF")
    check_image(content)
    assert np.array_equal(np.array(open_image(content, "L")), GREY)


def test_pixels_of_an_unknown_range_are_refused(tmp_path):
    file = tmp_path / "scan.tif"
    for dtype in (np.int32, np.float32):
        Image.fromarray(GREY.astype(dtype)).save(file)
        for read in (open_image, check_image):
            with pytest.raises(ValueError, match="Unknown range of pixels in .*scan.tif.*values from 0 to 255"):
                read(file)


def test_the_exif_orientation_is_applied_and_dropped():
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16] = 255  # left, which turned by 90 degrees is at the top and by 180 at the right
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        for orientation, size, white in ((3, (48, 16), (8, 40)), (6, (16, 48), (8, 8))):
            exif = Image.Exif()
            exif[0x0112] = orientation
            image = open_image(encode(Image.fromarray(pixels), kind, exif=exif))
            assert image.size == size, kind
            assert np.array(image)[white].min() > 250, kind
            assert image.getexif().get(0x0112) is None, kind


BROKEN = {
    "empty.jpg": (b"", "it is empty"),
    "text.png": (b"no image", "it is no image that Pillow can open"),
    "bomb.png": (encode(Image.new("1", (20_000, 20_000))), "exceeds limit"),
    "cut.jpg": (encode(noise(), "JPEG")[:700], "truncated"),
    "cut.png": (encode(noise())[:700], "truncated"),
}


def test_files_that_cannot_be_read_are_named(tmp_path):
    for name, (content, reason) in BROKEN.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"`images` must all be readable, but got '.*{name}': .*{reason}"):
            open_image(tmp_path / name)
        with pytest.raises(ValueError, match=f"`images` must all be readable, but got 'row 7': .*{reason}"):
            open_image(content, name="row 7")
        if not name.startswith("cut"):
            with pytest.raises(ValueError, match=f"{name}.*{reason}"):
                check_image(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="`images` must all be readable, but got '.*gone.png': .*No such file"):
        check_image(tmp_path / "gone.png")
