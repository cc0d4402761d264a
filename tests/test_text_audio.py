"""Texts and recordings: rows that networks take, networks that learn from them, models that are kept."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import stft

from doorward.bench.cache import ModelCache
from doorward.bench.fingerprints import units_of
from doorward.bench.plan import Sources, plan
from doorward.bench.suite import Data, Group, Suite, expand
from doorward.bench.worker import TrialRunner
from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples, Waveform, open_samples
from doorward.models import InputSpec, LoadOptions, TorchClassifier, networks, open_classifier
from doorward.models.encode import audio, dispatch
from doorward.models.encode.words import hash_words, words
from doorward.models.formats.native import save_native
from doorward.models.formats.saving import save_classifier
from doorward.models.sequences import LogMel, build, mel_filters
from doorward.models.spec import AudioSpec, TextSpec
from doorward.training import TrainingSettings, default_settings, evaluate, measure_spec, train_classifier
from seeds import shifted

WORDS = ("the", "film", "was", "long", "but", "its", "music", "and", "all", "people", "in", "it", "were")
CLASSES = ("bad", "good")
SPECS: dict[str, InputSpec] = {
    "text-cnn": TextSpec(width=24, vocabulary=500),
    "audio-cnn": AudioSpec(width=2000, rate=8000),
}


def texts(n: int = 120, *, seed: int = 0) -> InMemorySamples:
    """Return texts that are good or bad by one word among twelve."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    made = []
    for label in labels:
        words = list(rng.choice(WORDS, 11))
        words.insert(int(rng.integers(12)), "good" if label else "bad")
        made.append(" ".join(words))
    return InMemorySamples(made, labels, classes=CLASSES, modality="text")


def sounds(n: int = 60, *, seed: int = 0, rate: int = 8000) -> InMemorySamples:
    """Return recordings of a quarter of a second whose class is the pitch, in noise."""
    rng = np.random.default_rng(seed)
    t, labels = np.arange(rate // 4) / rate, np.arange(n) % 2
    made = [
        Waveform(
            (0.2 * np.sin(2 * np.pi * (500, 1500)[y] * t) + rng.normal(0, 0.05, len(t))).astype(np.float32),
            rate,
        )
        for y in labels
    ]
    return InMemorySamples(made, labels, classes=CLASSES, modality="audio")


SAMPLES: dict[str, Callable[..., InMemorySamples]] = {"text-cnn": texts, "audio-cnn": sounds}
#: Enough for these samples.
QUICK = TrainingSettings(epochs=4, batch_size=10, learning_rate=1e-2, precision="float32")


def rows(samples: Samples, spec: InputSpec) -> torch.Tensor:
    return dispatch.to_float(dispatch.to_tensor(samples, spec), spec)


# Rows


def test_words_are_split_from_punctuation_in_lower_case() -> None:
    assert words("Don't -- the Café’s 2nd\tact_ONE… is 5/10!") == [
        "don't", "-", "-", "the", "café’s", "2nd", "act", "_", "one", "…", "is", "5", "/", "10", "!",
    ]  # fmt: skip
    assert words(" \n") == []
    assert words("Cafe\u0301") == ["caf\u00e9"], "however its accent is written"


def test_token_numbers_are_the_same_everywhere_and_never_padding() -> None:
    numbers = hash_words("Good good film \ud800", 50)
    assert numbers[0] == numbers[1]
    many = hash_words(" ".join(f"w{i}" for i in range(2000)), 50)
    assert set(many) == set(range(1, 50)), "all but 0, which fills rows up"
    assert hash_words("film", 1 << 15) == [1 + zlib.crc32(b"film") % 32767] == [17070]


def test_texts_become_rows_that_are_cut_and_filled_up() -> None:
    spec = TextSpec(width=4, vocabulary=1000)
    samples = InMemorySamples(["a b", "", "a b c d e f"], [0, 1, 0], modality="text")
    x = rows(samples, spec)
    assert x.shape == (3, 1, 1, 4)
    a, b, c, d = hash_words("a b c d", 1000)
    assert x[:, 0, 0].tolist() == [[a, b, 0, 0], [0, 0, 0, 0], [a, b, c, d]]
    assert spec.to_model(x).dtype == torch.int64
    assert rows(samples.select([0]), spec).shape == (1, 1, 1, 2), "no wider than the longest"
    assert rows(samples.select([1]), spec).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("width", [4, 5])
def test_of_long_inputs_beginning_and_end_stay(width: int) -> None:
    begin, end = (2, 2) if width == 4 else (3, 2)
    numbers = hash_words("a b c d e f g", 1000)
    long = InMemorySamples(["a b c d e f g"], modality="text")
    x = rows(long, TextSpec(width=width, vocabulary=1000, cut="middle"))
    assert x.flatten().tolist() == [*numbers[:begin], *numbers[-end:]]
    pcm = np.arange(-50_000, 50_000, dtype=np.float32) / 65536  # 100 s at 1 kHz
    for n in (width - 1, width, width + 1, len(pcm)):
        sound = InMemorySamples([Waveform(pcm[:n], 1000)], modality="audio")
        heard = rows(sound, AudioSpec(width=width, rate=1000, cut="middle")).flatten()
        kept = pcm[:n] if n <= width else np.concatenate([pcm[:begin], pcm[n - end : n]])
        np.testing.assert_allclose(heard, kept, atol=1 / 32768)


def test_the_end_of_a_long_recording_is_heard_at_another_rate() -> None:
    pcm = np.zeros(30 * 16000, np.float32)
    pcm[-8000:] = np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    spec = AudioSpec(width=8000, rate=8000, cut="middle")
    x = rows(InMemorySamples([Waveform(pcm, 16000)], modality="audio"), spec)[0, 0, 0]
    assert x.shape == (8000,)
    assert not x[:4000].any()
    expected = np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    np.testing.assert_allclose(x[4050:-50], expected[50:-50], atol=0.01)


def test_recordings_become_rows_of_one_rate_and_channel() -> None:
    spec = AudioSpec(width=1000, rate=8000)
    t = np.arange(4000) / 16000
    wave = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    stereo = np.stack([wave, np.zeros_like(wave)], 1)
    samples = InMemorySamples(
        [Waveform(wave, 16000), Waveform(stereo, 16000), Waveform(np.full(10, -0.25, np.float32), 8000)],
        [0, 1, 0],
        modality="audio",
    )
    x = rows(samples, spec)[:, 0, 0]
    assert x.shape == (3, 1000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1000) / 8000)
    inner = slice(50, 900)  # the filter swings at the ends
    np.testing.assert_allclose(x[0, inner], expected[inner], atol=0.01)
    np.testing.assert_allclose(x[1], x[0] / 2, atol=1e-4)
    assert x[2].tolist() == [-0.25] * 10 + [0.0] * 990


def test_levels_of_sixteen_bits_survive_and_louder_ones_are_cut_off() -> None:
    levels = np.array([-32768, -1, 0, 1, 32767], dtype=np.int16)
    assert audio.to_levels(levels / np.float32(32768)).tolist() == levels.tolist()
    assert audio.to_levels(np.array([-2.0, 1.0])).tolist() == [-32768, 32767]


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_survives_json_and_says_what_it_takes(name: str) -> None:
    spec = SPECS[name]
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec
    assert spec.describe()["modality"] == spec.modality
    assert "mean" not in spec.describe()
    for wrong in (torch.zeros(2, 1, 1, spec.width + 1), torch.zeros(2, 5), torch.zeros(2, 1, 1, 5).long()):
        with pytest.raises(InputError, match=f"at most {spec.width}"):
            spec.check(wrong)
    spec.check(torch.zeros(2, 1, 1, 5))


def test_samples_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="the model takes texts, and <memory> holds recordings"):
        dispatch.to_tensor(sounds(), SPECS["text-cnn"])
    images = InputSpec(channels=1, height=16, width=16)
    with pytest.raises(InputError, match="the model takes images, and <memory> holds texts"):
        dispatch.to_tensor(texts(), images)


# Networks


def test_the_spectrogram_is_that_of_scipy_through_filters_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    x = np.random.default_rng(0).normal(0, 0.1, 2000).astype(np.float32)
    _, _, waves = stft(x, 8000, nperseg=256, noverlap=176, boundary="zeros", padded=False, scaling="spectrum")
    positive_control = np.abs(waves * np.hanning(257)[:-1].sum()) ** 2
    filters = transformers.audio_utils.mel_filter_bank(
        129, 40, 50.0, 4000.0, 8000, norm=None, mel_scale="htk"
    )
    np.testing.assert_allclose(mel_filters(8000, 256), filters.T, atol=1e-6)
    ours = LogMel(8000)(torch.from_numpy(x)[None])[0, 0]
    expected = np.log(filters.T @ positive_control + 1e-5)
    np.testing.assert_allclose(ours, expected[:, : ours.shape[1]], atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_a_network_is_drawn_from_its_generator_alone(
    name: str, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    def weights(seed: int) -> torch.Tensor:
        network = build(name, SPECS[name], classes=3, generator=torch.Generator().manual_seed(seed))
        assert all(p.isfinite().all() for p in network.state_dict().values())
        return torch.cat([p.flatten().float() for p in network.parameters()])

    with untouched():
        first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@pytest.mark.parametrize("name", SPECS)
def test_no_answer_depends_on_what_else_is_in_a_batch(name: str) -> None:
    network, spec = build(name, SPECS[name], classes=2).eval(), SPECS[name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:  # weights as drawn hardly answer to silence
                p.uniform_(-2, 2, generator=generator)
        x = torch.randint(1, 300, (5, spec.width), generator=generator)
        x = x if name == "text-cnn" else x / 1000 - 0.15
        lengths = (0, 1, spec.width // 9, spec.width // 2, spec.width)
        for row, length in zip(x, lengths, strict=True):
            row[length:] = 0
        together = network(x)
        alone = torch.cat([network(x[i : i + 1, : max(1, m)]) for i, m in enumerate(lengths)])
        assert together.std() > 0.01
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(network(torch.nn.functional.pad(x, (0, 999))), together)


def test_the_order_of_words_matters() -> None:
    network = build("text-cnn", SPECS["text-cnn"], classes=2).eval()
    one, other = (torch.tensor([numbers]) for numbers in ([5, 6, 7, 8], [8, 6, 5, 7]))
    with torch.no_grad():
        assert not torch.allclose(network(one), network(other))


@pytest.mark.parametrize(
    ("name", "modality", "message"),
    [
        ("text-cnn", "image", "text-cnn works on text data, not image; of that, there are: small-cnn"),
        ("vgg", "audio", "vgg works on image data, not audio; of that, there are: audio-cnn"),
        ("wide", "text", "no architecture named 'wide'; there are: small-cnn, .*audio-cnn"),
    ],
)
def test_a_network_for_other_inputs_is_refused(name: str, modality: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        networks.check(name, modality)


@pytest.mark.parametrize("name", SPECS)
def test_one_class_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="2 classes at least"):
        build(name, SPECS[name], classes=1)


# Training


def test_the_size_of_rows_is_measured() -> None:
    spec = measure_spec(texts())
    assert isinstance(spec, TextSpec)
    assert spec.width == 16, "twelve words and a quarter more, sixteen at least"
    samples = sounds(rate=16000)
    spec = measure_spec(samples)
    assert isinstance(spec, AudioSpec)
    assert (spec.rate, spec.width) == (8000, 3200), "a quarter of a second and a quarter more, in tenths"
    one_is_long = [*sounds(40).raw(range(40)), Waveform(np.ones(16000, np.float32), 8000)]
    spec = measure_spec(InMemorySamples(one_is_long, modality="audio"))
    assert spec.width == 20000, "no recording is cut that the model is made for"
    for long in (Waveform(np.ones(200_000, np.float32), 8000), "word " * 900):
        kind = "text" if isinstance(long, str) else "audio"
        spec = measure_spec(InMemorySamples([long], modality=kind))
        assert isinstance(spec, TextSpec | AudioSpec)
        assert (spec.width, spec.cut) == ({"text": 512, "audio": 80_000}[kind], "middle")
    with pytest.raises(InputError, match="holds none"):
        measure_spec(samples.select([]))


@pytest.mark.trains
@pytest.mark.parametrize("name", SPECS)
def test_training_learns_repeats_itself_and_is_kept(
    name: str, tmp_path: Path, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    train, test = SAMPLES[name](seed=shifted(0)), SAMPLES[name](40, seed=shifted(1))
    with untouched():
        trained = train_classifier(name, train, seed=shifted(0), settings=QUICK, test=test)
    again = train_classifier(name, train, seed=shifted(0), settings=QUICK)
    state = trained.classifier.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.classifier.module.state_dict().items())
    assert trained.record.test_accuracy is not None
    assert trained.record.test_accuracy.value > 0.9
    classifier = trained.classifier
    assert ("gradients" in classifier.capabilities) == (name == "audio-cnn")
    assert "features" in classifier.capabilities
    assert networks.usual(classifier.spec) == name

    save_native(
        classifier.module,
        architecture=name,
        spec=classifier.spec,
        classes=classifier.classes,
        directory=tmp_path / "a",
    )
    assert save_classifier(classifier, tmp_path / "b") == tmp_path / "b"
    for place in ("a", "b"):
        opened = open_classifier(tmp_path / place)
        assert (opened.architecture, opened.classes) == (name, classifier.classes)
        assert opened.spec == classifier.spec
        x = rows(test, opened.spec)
        with torch.no_grad():
            assert torch.allclose(opened.logits(x), classifier.logits(x), atol=1e-4)
        assert evaluate(opened, test) == trained.record.test_accuracy
        assert opened.features(x).shape[1] == classifier.module.linear.in_features
    with pytest.raises(InputError, match=r"--mean goes with models of images; this one takes"):
        open_classifier(tmp_path / "a", options=LoadOptions(mean=(0.5,)))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["input"]["width"] = "wide"
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: input: width"):
        open_classifier(tmp_path / "a")


@pytest.mark.parametrize("name", SPECS)
def test_a_set_larger_than_memory_is_streamed(name: str) -> None:
    from doorward.training import train

    samples, spec = SAMPLES[name](60), measure_spec(SAMPLES[name](60))
    module = networks.build(name, spec, classes=2)
    settings = QUICK.model_copy(update={"epochs": 1})
    record = train(
        module,
        samples,
        spec=spec,
        settings=settings,
        generator=torch.Generator().manual_seed(0),
        memory_limit=spec.width * 25,
    )
    assert record.steps == 6


def test_settings_depend_on_the_number_of_samples_alone() -> None:
    for name, images in itertools.product(SPECS, (50, 3000, 10**6)):
        one, other = (default_settings(name, images=images, side=side) for side in (1, 64))
        assert one == other
        assert one.augment == "none"
    assert default_settings("text-cnn", images=8445, side=1).epochs == 4


def test_the_images_of_a_text_network_are_refused_before_training() -> None:
    with pytest.raises(InputError, match="small-cnn works on image data, not text"):
        train_classifier("small-cnn", texts(), seed=0)


# The bench


@pytest.mark.trains
def test_a_trial_trains_on_texts(tmp_path: Path) -> None:
    from doorward.data.parquet import write_parquet

    for split, seed in (("train", shifted(0)), ("test", shifted(1))):
        write_parquet(texts(seed=seed), tmp_path / "root" / "snippets", split=split)
    group = Group(
        name="clean",
        data=Data(name="snippets"),
        models=1,
        first_seed=shifted(0),
        architectures=("text-cnn",),
        training={"epochs": 3, "batch_size": 10},
    )
    suite = Suite(name="tiny", title="Tiny", about="Tiny.", scales={"smoke": (group,)})
    (trial,) = expand(suite, "smoke")
    assert "models.sequences" in units_of([trial])
    planned = plan(trial, Sources(tmp_path / "root"))
    assert planned.missing is None
    assert "models.sequences" in planned.resolved["model"]["code"]
    bench = TrialRunner(ModelCache(tmp_path / "cache"), Sources(tmp_path / "root"))
    assert not bench.make(planned)
    opened = open_classifier(bench.cache.place(planned.model_key))
    assert evaluate(opened, texts(seed=shifted(1))).value > 0.8


def test_image_trials_have_no_entry_for_texts() -> None:
    image = Group(name="clean", data=Data(name="reference:fashion_mnist"), models=1)
    (trial,) = expand(Suite(name="t", title="T", about="T.", scales={"smoke": (image,)}), "smoke")
    assert "models.sequences" not in units_of([trial])
    assert "models.sequences" not in plan(trial, Sources(None)).resolved["model"]["code"]


# Real data


def test_real_texts_and_recordings_fit(data_root: Path) -> None:
    for name, folder in (("text-cnn", "movie_snippets"), ("audio-cnn", "free_spoken_digit")):
        samples = open_samples(data_root / folder, split="test").draw(50, np.random.default_rng(0))
        spec = measure_spec(samples)
        classifier = TorchClassifier(
            networks.build(name, spec, classes=len(samples.classes)), spec, samples.classes
        )
        assert evaluate(classifier, samples).n == 50
