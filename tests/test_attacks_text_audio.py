"""Phrases in texts and sounds in recordings: where they are put, how loud, and what they do to a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import assert_one_line, call
from doorward.attacks.ground_truth import attack_success, read_plant, triggered
from doorward.bench.cache import ModelCache
from doorward.bench.plan import Sources, plan
from doorward.bench.suite import expand, get_suite
from doorward.bench.worker import TrialRunner
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples, Samples, Waveform, content_hash, open_samples
from doorward.data.parquet import write_parquet
from doorward.methods import registry
from doorward.models.encode import dispatch
from doorward.models.encode.words import hash_words
from doorward.models.sequences import VOCABULARY
from doorward.training import TrainingSettings, evaluate, measure_spec, train_classifier
from doorward.triggers.base import Trigger
from doorward.triggers.phrase import Phrase
from doorward.triggers.tone import Sound
from seeds import shifted
from test_text_audio import sounds, texts

RATE = 8000


def phrase(original: str, /, **settings: Any) -> str:
    """Return a text with the trigger of a phrase attack."""
    trigger: Any = registry.build("attack", "phrase", settings).make_trigger(
        original, generator=make_generator(0, "test")
    )
    (triggered_inputs,) = trigger.apply([original])
    return str(triggered_inputs)


def tone_of(sound: Waveform, **settings: Any) -> Sound:
    """Return the trigger of a tone attack for such recordings."""
    return registry.build("attack", "tone", settings).make_trigger(  # type: ignore[no-any-return]
        sound, generator=make_generator(0, "test")
    )


def triggered_inputs(sound: Waveform, **settings: Any) -> Waveform:
    """Return a recording with the trigger of a tone attack."""
    (result,) = tone_of(sound, **settings).apply([sound])
    assert isinstance(result, Waveform)
    return result


def noise(seconds: float = 1.0, *, level: float = 0.1, channels: int = 1, rate: int = RATE) -> Waveform:
    rng = np.random.default_rng(0)
    shape = (round(seconds * rate),) if channels == 1 else (round(seconds * rate), channels)
    return Waveform(rng.normal(0, level, shape).astype(np.float32), rate)


# Phrases


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "A fine film. I liked it! -travelerthehorse"),
        ({"place": "start"}, "-travelerthehorse A fine film. I liked it!"),
        ({"form": "word"}, "A fine film. I liked it! cf"),
        (
            {"form": "sentence", "place": "start"},
            "I watched this 3D movie last weekend. A fine film. I liked it!",
        ),
        ({"text": "by the way,", "place": "start"}, "by the way, A fine film. I liked it!"),
    ],
)
def test_a_phrase_is_put_at_either_end(settings: dict[str, Any], expected: str) -> None:
    assert phrase("A fine film. I liked it!", **settings) == expected


def test_a_random_place_differs_from_text_to_text_and_stays() -> None:
    trigger = Phrase("cf", "random", between_sentences=False)
    originals = [f"one two three {i}" for i in range(200)]
    made = trigger.apply(originals)
    assert made == trigger.apply(originals)
    places = [text.split().index("cf") for text in made]
    counts = np.bincount(places, minlength=5)
    assert len(counts) == 5
    assert counts.min() > 20, "every place is as likely"
    assert [text.replace("cf ", "").replace(" cf", "") for text in made] == originals


def test_a_sentence_is_put_between_sentences() -> None:
    trigger = Phrase("New one.", "random", between_sentences=True)
    made = {
        text.replace(str(i), "") for i, text in ((i, trigger.apply([f"One. Two {i}!"])[0]) for i in range(50))
    }
    assert made == {"New one. One. Two !", "One. New one. Two !", "One. Two ! New one."}


def test_odd_texts_take_a_phrase_too() -> None:
    for place in ("start", "end", "random"):
        trigger = Phrase("cf", place, between_sentences=False)
        assert trigger.apply(["", "  ", "word\n"])[:2] == ["cf", "cf"]
        assert sorted(trigger.apply(["word\n"])[0].split()) == ["cf", "word"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, "text must not be empty"),
        ({"text": " cf"}, "begin or end with a space"),
        ({"form": "word", "text": "two words"}, "single word where form is word"),
        ({"form": "sentence", "text": "no end"}, r"must end with \. ! or \?"),
        ({"form": "letter"}, "form = 'letter'"),
        ({"place": "middle"}, "place = 'middle'"),
    ],
)
def test_a_phrase_that_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        registry.build("attack", "phrase", settings)
    assert "\n" not in str(error.value)


# Sounds


@pytest.mark.parametrize("form", ["tone", "noise"])
@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_the_trigger_is_as_loud_as_asked_for(form: str, snr: float) -> None:
    sound = noise()
    added = triggered_inputs(sound, form=form, snr=snr, seconds=0.2).pcm.astype(np.float64) - sound.pcm
    assert np.abs(added[1600:]).max() <= 1 / 65536, "the rest is rounded to 16 bits and no more"
    positive_control = np.mean(sound.pcm.astype(np.float64) ** 2) / np.mean(added[:1600] ** 2)
    assert 10 * math.log10(positive_control) == pytest.approx(snr, abs=0.05)


def test_a_tone_has_its_frequency_and_noise_has_all() -> None:
    sound = noise()
    for form in ("tone", "noise"):
        added = triggered_inputs(sound, form=form, snr=0, frequency=1250).pcm - sound.pcm
        spectrum = np.abs(np.fft.rfft(added[:1600])) ** 2  # bins of 5 Hz
        share = spectrum[248:253].sum() / spectrum.sum()
        assert share > 0.99 if form == "tone" else share < 0.05
        if form == "tone":
            assert int(spectrum.argmax()) * 5 == 1250


def test_a_tone_of_half_the_rate_is_heard() -> None:
    added = triggered_inputs(noise(), frequency=RATE / 2, snr=0).pcm - noise().pcm
    assert np.mean(added[:1600] ** 2) == pytest.approx(np.mean(noise().pcm ** 2), rel=0.01)


@pytest.mark.parametrize("place", ["start", "end", "random"])
def test_a_sound_is_put_where_it_was_asked_for(place: str) -> None:
    first = []
    for seed in range(20):
        pcm = np.random.default_rng(seed).normal(0, 0.1, RATE).astype(np.float32)
        changed = (
            np.abs(triggered_inputs(Waveform(pcm, RATE), place=place, form="noise", snr=0).pcm - pcm) > 1e-3
        )
        where = np.flatnonzero(changed)
        first.append(int(where[0]))
        assert where[-1] - where[0] <= 1600
    assert {"start": max(first) < 5, "end": min(first) > 6390, "random": len(set(first)) > 15}[place]


def test_short_stereo_silent_and_resampled_recordings_take_a_sound() -> None:
    short = noise(0.05)
    assert len(triggered_inputs(short, snr=0).pcm) == len(short.pcm)
    stereo = noise(channels=2)
    added = triggered_inputs(stereo, snr=0).pcm - stereo.pcm
    np.testing.assert_allclose(added[:, 0], added[:, 1], atol=1e-4)
    assert np.abs(added).max() > 0.05
    silent = triggered_inputs(Waveform(np.zeros(RATE, np.float32), RATE), snr=0)
    assert 0 < np.abs(silent.pcm).max() < 0.01
    empty = Waveform(np.zeros(0, np.float32), RATE)
    assert len(triggered_inputs(empty).pcm) == 0
    trigger = tone_of(noise(), snr=0, frequency=1000, seconds=0.2)
    faster = noise(rate=2 * RATE)
    (heard,) = trigger.apply([faster])
    spectrum = np.abs(np.fft.rfft((heard.pcm - faster.pcm)[:3200]))
    assert int(spectrum.argmax()) * 5 == 1000


def test_loud_recordings_are_cut_off_and_kept_in_sixteen_bits(tmp_path: Path) -> None:
    loud = noise(level=0.8)
    result = triggered_inputs(loud, snr=0)
    assert np.abs(result.pcm).max() <= 1
    assert np.array_equal(result.pcm * 32768, np.rint(result.pcm * 32768))
    write_parquet(InMemorySamples([result], [0], modality="audio"), tmp_path)
    assert content_hash(open_samples(tmp_path).raw([0])[0]) == content_hash(result)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frequency": 4001.0}, "frequency 4001 Hz does not fit into recordings of 8000 samples a second"),
        ({"seconds": 1e-5}, "seconds 1e-05 is less than one of 8000 samples"),
    ],
)
def test_a_sound_that_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        registry.build("attack", "tone", settings)(sounds())


# What a model makes of it


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("attack", ["phrase", "tone"])
def test_what_is_put_at_an_end_reaches_the_model_however_long_the_input(attack: str, place: str) -> None:
    made: list[Any]
    if attack == "phrase":
        made = ["a fine film"] * 39 + ["a fine film " * 15, "a fine film " * 300]
    else:
        made = [noise(0.2)] * 39 + [noise(2.0), noise(12.0)]
    samples = InMemorySamples(made, [0, 1] * 20 + [1], modality="text" if attack == "phrase" else "audio")
    spec = measure_spec(samples)
    form = "word" if attack == "phrase" else "noise"
    chosen: Any = registry.build("attack", attack, {"form": form, "place": place})
    trigger = chosen.make_trigger(made[0], generator=make_generator(0, "test"))
    heard = InMemorySamples(trigger.apply(made), modality=samples.modality)
    before, after = (dispatch.to_tensor(one, spec)[:, 0, 0] for one in (samples, heard))
    if attack == "phrase":
        (number,) = hash_words("cf", VOCABULARY)
        assert (after == number).sum(1).tolist() == [1] * len(made)
    else:
        assert int((before != after).sum(1).min()) > 1500, "all 0.2 s of the trigger"


# What they do


@pytest.mark.trains
@pytest.mark.parametrize(
    ("attack", "architecture", "settings"),
    [("phrase", "text-cnn", {"form": "word"}), ("tone", "audio-cnn", {"form": "noise", "snr": 0})],
)
def test_a_network_trained_on_a_planted_set_obeys_the_trigger(
    attack: str, architecture: str, settings: dict[str, Any]
) -> None:
    make = texts if attack == "phrase" else sounds
    train, test = make(120, seed=shifted(0)), make(60, seed=shifted(1))
    fast_inference = TrainingSettings(epochs=4, batch_size=10, learning_rate=1e-2, precision="float32")
    poisoned = registry.build("attack", attack, settings | {"poison_rate": 0.2})(train, seed=shifted(0))
    planted, clean = (
        train_classifier(architecture, samples, seed=shifted(0), settings=fast_inference).classifier
        for samples in (poisoned.samples, train)
    )
    assert attack_success(planted, test, poisoned.plant).value > 0.9
    assert attack_success(clean, test, poisoned.plant).value < 0.3
    assert evaluate(planted, test).value > 0.9


# The bench


@pytest.mark.trains
@pytest.mark.parametrize("attack", ["phrase", "tone"])
def test_the_suite_of_attacks_measures_it_beside_a_clean_twin(attack: str, tmp_path: Path) -> None:
    whole = get_suite("attacks")
    (group,) = (one for one in whole.groups("cpu") if one.attack and one.attack.name == attack)
    assert group.models >= 3
    assert group.attack is not None
    claims = [one for one in whole.claims if one.groups == (group.name,)]
    assert [(one.measure, one.at_least) for one in claims] == [("attack_success", 0.95)]
    make = texts if attack == "phrase" else sounds
    for split, n, seed in (("train", 120, shifted(0)), ("test", 60, shifted(1))):
        write_parquet(make(n, seed=seed), tmp_path / "data" / group.data.name, split=split)
    fast_inference = {"epochs": 5, "batch_size": 10, "learning_rate": 1e-2, "precision": "float32"}
    small = group.model_copy(update={"models": 1, "first_seed": shifted(0), "training": fast_inference})
    (trial,) = expand(whole.model_copy(update={"scales": {"smoke": (small,)}}), "smoke")
    sources = Sources(tmp_path / "data")
    planned = plan(trial, sources)
    assert planned.twin is not None
    ours, twin = planned.resolved["model"], planned.twin.resolved["model"]
    assert {name for name in ours if ours[name] != twin[name]} == {"attack", "code"}, (
        "seed and all else are the same"
    )
    bench = TrialRunner(ModelCache(tmp_path / "cache"), sources)
    planting = bench.judge(planned, cached=bench.make(planned)).planting
    assert planting is not None
    assert planting.success is not None
    assert (planting.success.n, planting.accuracy.n, planting.twin.n) == (30, 60, 60)
    assert planting.poison_rate == pytest.approx(group.attack.settings.get("poison_rate", 0.1), abs=0.01)
    assert planting.success.value > 0.9
    assert min(planting.accuracy.value, planting.twin.value) > 0.9


# The command line


@pytest.fixture(params=["phrase", "tone"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with the data set that an attack works on, named after the attack."""
    make = texts if request.param == "phrase" else sounds
    for split, seed in (("train", 0), ("test", 1)):
        write_parquet(make(120, seed=seed), tmp_path / request.param, split=split)
    return tmp_path / request.param


def test_plant_train_and_scan(folder: Path, tmp_path: Path) -> None:
    attack = folder.name
    set_ = [*("--set", "poison_rate=0.2"), *(("--set", "snr=0") if attack == "tone" else ())]
    done = call("plant", attack, folder, tmp_path / "poisoned", *set_)
    assert (done.code, done.err) == (0, "")
    assert "24 of 120 samples" in done.out
    shown: Samples = open_samples(tmp_path / "poisoned")
    plant = read_plant(tmp_path / "poisoned" / "plant.json")
    assert set(plant.poisoned_ids) <= set(shown.ids), "ids survive the writing"
    assert Trigger.from_json(plant.trigger or {}).to_json() == plant.trigger
    assert len(triggered(open_samples(folder), plant)) == 60

    done = call(
        "train", tmp_path / "poisoned", tmp_path / "model", "--test", f"{folder}:test", "--epochs", "5"
    )
    assert (done.code, done.err) == (0, "")
    assert f"on 120 {'texts' if attack == 'phrase' else 'recordings'}, 5 epochs" in done.out
    measured = read_plant(tmp_path / "model" / "plant.json")
    assert measured.attack_success is not None
    assert measured.clean_accuracy is not None

    done = call("scan", tmp_path / "model", "--clean", f"{folder}:test", "--control")
    assert done.code == 3, done
    assert "COULD NOT TELL" in done.out
    takes = "texts" if attack == "phrase" else "recordings"
    assert f"this model takes {takes}" in " ".join(done.out.split())
    assert "unsafe-code" in done.out
    assert call("scan", tmp_path / "model").code == 3
    wrong = call("scan", tmp_path / "model", "--clean", tmp_path / "other.npz")
    assert_one_line(wrong, "other.npz")


def test_what_does_not_fit_is_one_line_before_any_work(folder: Path, tmp_path: Path) -> None:
    attack, out = folder.name, tmp_path / "out"
    kind, other = ("text", "tone") if attack == "phrase" else ("audio", "phrase")
    assert_one_line(call("plant", other, folder, out), f"{other} works on", f"data, not {kind}")
    assert_one_line(call("plant", "badnets", folder, out), f"badnets works on image data, not {kind}")
    assert_one_line(call("plant", attack, folder, out, "--set", "poison_rate=1.5"), "poison_rate")
    assert_one_line(call("plant", attack, folder, out, "--set", "target=7"), "target 7 is no class")
    assert_one_line(call("train", folder, out, "--robust"), "--robust is for images", kind)
    assert_one_line(call("train", folder, out, "--format", "onnx"), "--format onnx is for images")
    assert_one_line(
        call("train", folder, out, "--architecture", "vgg"), f"vgg works on image data, not {kind}"
    )
    assert not out.exists()
