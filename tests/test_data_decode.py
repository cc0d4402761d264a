"""Bytes become pixels and waveforms: against Pillow, the wave module and soundfile."""

import io
import struct
import sys
import wave
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from doorward.core.errors import InputError, MissingExtra
from doorward.data import Waveform, content_hash
from doorward.data.decode import decode_audio, decode_image, encode_audio, encode_image

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def stored(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_grey_and_colour_are_kept_as_they_are() -> None:
    grey, colour = decode_image(stored(Image.fromarray(GREY))), decode_image(stored(Image.fromarray(COLOUR)))
    assert grey.dtype == colour.dtype == np.uint8
    np.testing.assert_array_equal(grey, GREY[..., None])
    np.testing.assert_array_equal(colour, COLOUR)
    assert grey.flags.writeable, "torch.from_numpy warns of read-only arrays"


@pytest.mark.parametrize("form", ["WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_give_the_same_pixels(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    image = Image.fromarray(COLOUR)
    expected = COLOUR
    if form == "GIF":  # 35 pixels fit a palette
        image = image.quantize(256, dither=Image.Dither.NONE)
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(stored(image, form, **options)), expected)


def test_jpeg_is_what_pillow_decodes() -> None:
    for image in (Image.fromarray(COLOUR), Image.fromarray(GREY), Image.fromarray(COLOUR).convert("CMYK")):
        data = stored(image, "JPEG")
        expected = Image.open(io.BytesIO(data))
        expected = expected if image.mode == "L" else expected.convert("RGB")
        np.testing.assert_array_equal(decode_image(data).squeeze(), np.asarray(expected))


def test_one_bit_becomes_black_and_white() -> None:
    bits = GREY > 127
    np.testing.assert_array_equal(decode_image(stored(Image.fromarray(bits)))[..., 0], bits * np.uint8(255))


def test_palette_becomes_colour_even_with_transparency() -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode_image(stored(image)), expected)
    with_alpha = stored(image, transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(decode_image(with_alpha), expected)


def test_alpha_is_dropped_so_that_what_a_model_sees_is_kept() -> None:
    alpha = np.zeros((5, 7, 1), np.uint8)  # wholly transparent: a viewer shows nothing, a model sees it all
    colour = Image.fromarray(np.concatenate([COLOUR, alpha], axis=2))
    np.testing.assert_array_equal(decode_image(stored(colour)), COLOUR)
    grey = Image.fromarray(np.concatenate([GREY[..., None], alpha], axis=2), "LA")
    np.testing.assert_array_equal(decode_image(stored(grey)), GREY[..., None])


def test_of_sixteen_bits_the_upper_eight_are_kept() -> None:
    wide = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    expected = (wide >> 8)[..., None]
    np.testing.assert_array_equal(decode_image(stored(Image.fromarray(wide))), expected)
    pgm = b"P5 7 5 65535\n" + wide.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(pgm), expected)
    np.testing.assert_array_equal(decode_image(stored(Image.fromarray(wide), "TIFF")), expected)
    raw = np.stack([wide] * 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in raw)
    np.testing.assert_array_equal(decode_image(png(7, 5, rows, bits=16, colour=2)), expected.repeat(3, 2))


def png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 0) -> bytes:
    """Write a PNG file by hand, after its specification."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int32)])
def test_pixels_without_a_known_range_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="no known range"):
        decode_image(stored(Image.fromarray(pixels), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda x: x), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_exif_orientation_is_applied(form: str, orientation: int, turn: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOUR)
    options = {"lossless": True} if form == "WEBP" else {}
    data = stored(image, form, exif=exif, **options)
    plain = np.asarray(Image.open(io.BytesIO(stored(image, form, **options))))
    np.testing.assert_array_equal(decode_image(data), turn(plain))


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("L", (3, 3), level) for level in (10, 200)]
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data) == 10).all()


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bombs_are_refused_before_they_are_unpacked(side: int) -> None:
    # the smaller is one where Pillow only warns, the larger one where it refuses by itself
    data = png(side, side, b"\0" * 64)
    with pytest.raises((InputError, Image.DecompressionBombWarning, Image.DecompressionBombError)):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_where_pillow_only_warns() -> None:
    with pytest.raises(InputError, match="10000x10000 pixels are too many"):
        decode_image(png(10_000, 10_000, b"\0" * 64))


def test_postscript_is_not_run() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(data)).format == "EPS", "or else this test shows nothing"
    with pytest.raises(InputError, match="not a known image format"):
        decode_image(data)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_images_are_written_without_loss(height: int, width: int, channels: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode_image(image)), image)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 2), (4, 4, 4)])
def test_other_shapes_are_not_written(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="uint8"):
        encode_image(np.zeros(shape, np.uint8))


def test_wav_files_are_read_as_their_samples() -> None:
    samples = RNG.integers(-(2**15), 2**15, (50, 2), dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(samples.astype("<i2").tobytes())
    sound = decode_audio(out.getvalue())
    assert sound.rate == 8000
    assert sound.pcm.dtype == np.float32
    np.testing.assert_array_equal(sound.pcm, samples / 32768)


SOUNDS = [
    RNG.integers(-(2**15), 2**15, 40).astype(np.float32) / 32768,
    RNG.integers(-(2**15), 2**15, (40, 2)).astype(np.float32) / 32768,
    RNG.normal(size=40).astype(np.float32),
    RNG.normal(size=(40, 3)).astype(np.float32),
    np.array([-1.0, 1.0], np.float32),  # +1 is not among 16 bits
    np.array([0.5, -0.0], np.float32),  # nor is minus zero
]


@pytest.mark.parametrize(("pcm", "subtype"), list(zip(SOUNDS, ["PCM_16"] * 2 + ["FLOAT"] * 4, strict=True)))
def test_sounds_are_written_without_loss(pcm: np.ndarray, subtype: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    data = encode_audio(Waveform(pcm, 16000))
    assert soundfile.info(io.BytesIO(data)).subtype == subtype
    back, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 16000
    np.testing.assert_array_equal(back, pcm)
    assert content_hash(decode_audio(data)) == content_hash(Waveform(pcm, 16000))
    assert encode_audio(Waveform(pcm, 16000)) == data, "no time stamp, unlike libsndfile's own"


def test_sounds_that_are_no_numbers_or_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no numbers"):
        decode_audio(encode_audio(Waveform(np.array([0.5, np.nan], np.float32), 8000)))
    monkeypatch.setattr("doorward.data.decode.MAX_SOUND", 39)
    with pytest.raises(InputError, match="40 frames are too many"):
        decode_audio(encode_audio(Waveform(SOUNDS[0], 8000)))


@pytest.mark.parametrize("rate", [1_000_001, 2**31 - 1])
def test_rates_that_no_recording_has_are_refused(rate: int) -> None:
    data = bytearray(encode_audio(Waveform(SOUNDS[0], 8000)))
    data[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(InputError, match=f"{rate} samples a second cannot be, at most 1,000,000"):
        decode_audio(bytes(data))


def test_damaged_sounds_are_told_in_words() -> None:
    for data in (b"", b"junk", encode_audio(Waveform(SOUNDS[0], 8000))[:30]):
        with pytest.raises(InputError) as caught:
            decode_audio(data)
        assert "BytesIO" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtra, match=r"doorward\[audio\]"):
        decode_audio(encode_audio(Waveform(SOUNDS[0], 8000)))
