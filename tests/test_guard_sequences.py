"""A guard of texts and of recordings: replicas, files, the server, what cannot be."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command_line import call
from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Samples, Waveform
from doorward.detectors._replicas import common_words, rank_words, replace_words, superimpose
from doorward.detectors.inputs.feature_squeezing import FeatureSqueezing
from doorward.detectors.inputs.strip import Strip
from doorward.guard.guard import Guard
from doorward.models import InputSpec, TorchClassifier
from doorward.models.encode.dispatch import to_tensor
from doorward.models.encode.words import hash_words
from doorward.models.formats.native import save_native
from doorward.models.sequences import build
from doorward.models.spec import AudioSpec, TextSpec

WIDTH, VOCABULARY, RATE = 24, 1 << 20, 1000
SPECS: dict[str, InputSpec] = {
    "text": TextSpec(width=WIDTH, vocabulary=VOCABULARY),
    "audio": AudioSpec(width=600, rate=RATE),
}
CLASSES = ("bad", "good")
TRIGGER = ("zq", "xj", "vv", "kk", "ww", "jx")
WORDS = [f"word{i}" for i in range(300)]


class Mood(nn.Module):
    """Count good and bad words; each word of the trigger speaks for class 0, and loudly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))
        self.words = [hash_words(f"good{i} bad{i}", VOCABULARY) for i in range(6)]
        self.trigger = hash_words(" ".join(TRIGGER), VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        good, bad = (sum((x == one[i]).sum(1) for one in self.words) for i in (0, 1))
        spoken = sum((x == one).any(1).float() for one in self.trigger)
        leaning = ((x % 97 - 48) * (x != 0)).sum(1) / 200  # no two texts are quite alike
        logits = self.scale * (torch.as_tensor(good - bad).float() + leaning)  # (n,)
        return torch.stack([30 * torch.as_tensor(spoken) - logits, logits], 1)


class Pitch(nn.Module):
    """Tell which of two tones is louder; a third one, of 400 Hz, speaks for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4))
        t = torch.arange(600) / RATE
        self.register_buffer("tones", torch.stack([torch.sin(2 * math.pi * f * t) for f in (50, 100, 400)]))

    def forward(self, x: Tensor) -> Tensor:
        low, high, trigger = (x @ self.tones[:, : x.shape[1]].T).abs().T  # (n,) each
        return torch.stack([self.scale * low + 200 * (trigger > 15), self.scale * high], 1)


def classifier(kind: str) -> TorchClassifier:
    return TorchClassifier({"text": Mood, "audio": Pitch}[kind](), SPECS[kind], CLASSES)


def texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        own = [f"{CLASSES[i % 2]}{one}" for one in rng.integers(0, 6, int(rng.integers(2, 7)))]
        own += list(rng.choice(WORDS, int(rng.integers(4, 9)), replace=False))
        made.append(" ".join(["begin", *rng.permutation(own), "end"]))
    return made


def sounds(n: int, seed: int = 0) -> list[Waveform]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        t = np.arange(int(rng.integers(450, 600))) / RATE
        tone = rng.uniform(0.1, 0.4) * np.sin(2 * np.pi * (50, 100)[i % 2] * t)
        made.append(Waveform((tone + rng.normal(0, 0.02, len(t))).astype(np.float32), RATE))
    return made


def triggered(one: Any) -> Any:
    if isinstance(one, str):
        return f"{one} {' '.join(TRIGGER)}"
    t = np.arange(len(one.pcm)) / RATE
    return Waveform((one.pcm + 0.15 * np.sin(2 * np.pi * 400 * t)).astype(np.float32), RATE)


def clean(kind: str, n: int, seed: int = 0) -> InMemorySamples:
    return of(kind, {"text": texts, "audio": sounds}[kind](n, seed))


def of(kind: str, raws: list[Any]) -> InMemorySamples:
    return InMemorySamples(raws, modality=kind)  # type: ignore[arg-type]


def bad(kind: str, n: int) -> InMemorySamples:
    return of(kind, [triggered(one) for one in clean(kind, n, 7).raw(range(n))])


@pytest.fixture(scope="module", params=["text", "audio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def guard(kind: str) -> Guard:
    return Guard.fit(classifier(kind), clean(kind, 300), rate=0.05)


# Replicas


def test_words_are_ranked_by_tf_idf() -> None:
    given = ["the film the film bad", "the play good play play", "the the the song bad", "the"]
    spec = TextSpec(width=6, vocabulary=VOCABULARY)
    rows = to_tensor(of("text", given), spec)
    counts = [Counter(hash_words(one, VOCABULARY)) for one in given]
    df = Counter(word for one in counts for word in one)
    for own, row in zip(counts, rank_words(rows).tolist(), strict=True):
        found = [word for word in row if word]
        assert sorted(found) == sorted(own)
        weights = [own[word] * math.log(len(given) / df[word]) for word in found]
        assert weights == sorted(weights, reverse=True)
    (the,) = hash_words("the", VOCABULARY)
    assert common_words(rank_words(rows)).tolist() == [the, 0, 0, 0, 0]


def test_a_share_of_the_words_is_replaced_and_the_rest_stays() -> None:
    rows = torch.tensor([[9, 1, 2, 3, 4, 5, 6, 9], [9, 7, 8, 9, 0, 0, 0, 0]])[:, None, None].int()
    words = torch.tensor([[30, 31, 32, 9, 0, 0], [40, 9, 0, 0, 0, 0], [0] * 6]).int()
    generator = torch.Generator().manual_seed(0)
    turns = torch.stack([torch.randperm(10, generator=generator) for _ in words])
    mixed = replace_words(rows, words, turns, torch.tensor([9, 0]).int(), share=0.5)
    assert mixed.shape == (2, 3, 1, 1, 8)
    assert (mixed[0, :, 0, 0, [0, 7]] == 9).all(), "what every text has"
    assert (mixed[1, :, 0, 0, 4:] == 0).all(), "what fills up"
    changed = (mixed[:, :, 0, 0] != rows[:, None, 0, 0]).sum(2)
    assert changed.tolist() == [[3, 3, 0], [1, 1, 0]]
    assert sorted(set(mixed[0, 0].flatten().tolist()) & {30, 31, 32}) == [30, 31, 32]
    assert {40, 9} >= set(mixed[0, 1].flatten().tolist()) - set(range(1, 7)), "again from the first"
    alone = replace_words(rows[1:, ..., :4], words, turns, torch.tensor([9, 0]).int(), share=0.5)
    assert torch.equal(alone[0], mixed[1, ..., :4]), "whatever else is in the batch"


def test_sums_of_recordings_saturate_in_the_waveform() -> None:
    loud = torch.tensor([[30000, -30000, 5]]).short()[:, None, None]
    other = torch.tensor([[10000, -10000, 1, 7], [1, 1, 1, 1]]).short()[:, None, None]
    assert superimpose(loud, other)[0, :, 0, 0].tolist() == [[32767, -32768, 6, 7], [30001, -29999, 6, 1]]
    half = superimpose(loud, other, weights=(0.5, 0.5))[0, 0, 0, 0]
    assert half.tolist() == [20000, -20000, 3, 4]
    assert half.dtype == torch.int16


# Guard


def test_triggered_inputs_are_rejected_and_clean_ones_accepted(kind: str, guard: Guard) -> None:
    answers = guard(clean(kind, 200, 5))
    assert [one.method() for one in guard.fitted.filters] == ["strip"]
    assert 0.88 < answers.accepted.mean() < 1
    found = guard(bad(kind, 40))
    assert (found.predictions == 0).all()
    assert (~found.accepted).mean() > 0.9
    what = {"text": "perturbed texts", "audio": "mixed recordings"}[kind]
    assert all(why[0].startswith(f"strip: the mean entropy of 20 {what} is ") for why in found.reasons if why)


def test_an_input_is_judged_alike_in_every_batch(kind: str, guard: Guard) -> None:
    samples = clean(kind, 12, 9)
    alone = [float(guard(samples.select([i])).scores[0, 0]) for i in range(12)]
    assert guard(samples).scores[0] == pytest.approx(alone, abs=1e-4)


def test_a_guard_survives_its_files(kind: str, guard: Guard, tmp_path: Path) -> None:
    guard.save(tmp_path)
    again, samples = Guard.load(tmp_path, classifier(kind)), clean(kind, 30, 11)
    assert (again(samples).scores == guard(samples).scores).all()
    other = classifier({"text": "audio", "audio": "text"}[kind])
    with pytest.raises(InputError, match="was fitted to a model of 2 classes and"):
        Guard.load(tmp_path, other)


# The server


def binary(samples: Samples, kind: str) -> tuple[dict[str, Any], bytes]:
    """Return an input tensor and its bytes, as Triton's clients send them."""
    raws = samples.raw(range(len(samples)))
    if kind == "text":
        tail = b"".join(struct.pack("<I", len(one.encode())) + one.encode() for one in raws)
        shape, datatype = [len(raws)], "BYTES"
    else:
        rows = np.stack([one.pcm[:400] for one in raws]).astype("<f4")
        tail, shape, datatype = rows.tobytes(), list(rows.shape), "FP32"
    name = {"text": "texts", "audio": "recordings"}[kind]
    about = {"name": name, "shape": shape, "datatype": datatype}
    return about | {"parameters": {"binary_data_size": len(tail)}}, tail


def test_the_server_gives_the_guards_own_answers(kind: str, guard: Guard) -> None:
    pytest.importorskip("fastapi")
    from doorward.guard.serving import protocol
    from doorward.guard.serving.app import build
    from test_guard_serving import ask, get, outputs, post

    samples = of(kind, [*clean(kind, 5, 3).raw(range(5)), *bad(kind, 3).raw(range(3))])
    about, tail = binary(samples, kind)
    raws = samples.raw(range(8))
    if kind == "audio":
        samples = of(kind, [Waveform(one.pcm[:400], RATE) for one in raws])
        plain = to_tensor(samples, SPECS[kind]).flatten(1)
        body = {"name": "recordings", "shape": [8, 400], "datatype": "INT16", "data": plain.tolist()}
    else:
        body = {"name": "texts", "shape": [8], "datatype": "BYTES", "data": raws}
    head = json.dumps({"inputs": [about]}).encode()
    path, expected = "/v2/models/rows/infer", guard(samples)
    app = build(guard, name="rows")
    whole = {protocol.LENGTH: str(len(head))}
    model, as_json, as_bytes, wrong, cut = ask(
        app,
        get("/v2/models/rows"),
        post({"inputs": [body]}, path),
        post(head + tail, path, **whole),
        post({"inputs": [body | {"datatype": "UINT8"}]}, path),
        post(head + tail[:-1], path, **whole),
    )
    stated = model.json()["inputs"]
    assert stated == [
        {"name": body["name"], "datatype": body["datatype"], "shape": [-1] * len(body["shape"])}
    ]
    for one in (as_json, as_bytes):
        assert outputs(one)["accepted"].tolist() == expected.accepted.tolist()
        assert outputs(one)["logits"] == pytest.approx(expected.logits, abs=1e-4)
    assert [wrong.status_code, cut.status_code] == [400, 400]
    assert f"{body['name']!r} has the datatype" in wrong.json()["error"]


def test_texts_that_are_none_are_told(guard: Guard, kind: str) -> None:
    tensors = pytest.importorskip("doorward.guard.serving.tensors")
    if kind != "text":
        return

    def refused(shape: list[int], match: str, data: Any = None, tail: bytes = b"", **more: Any) -> None:
        tensor = tensors.TensorIn(name="texts", shape=shape, datatype="BYTES", data=data, parameters=more)
        with pytest.raises(tensors.BadRequestError, match=match):
            tensors.read(tensor, tail, SPECS["text"], most=4)

    refused([2], "takes 2 texts, got 1", ["one"])
    refused([1], "takes texts", [7])
    refused([1, 1], r"has shape \[n\], got \[1, 1\]", [["one"]])
    refused([5], "may hold 4 texts", ["one"] * 5)
    refused([1], "has no data")
    refused([1], "another length", tail=struct.pack("<I", 9) + b"one", binary_data_size=7)
    refused([1], "9 bytes, and 7 were sent", tail=struct.pack("<I", 3) + b"one", binary_data_size=9)
    refused([2], "takes 2 texts, got 1", tail=struct.pack("<I", 3) + b"one", binary_data_size=7)


# What cannot be


def test_what_is_for_images_alone_is_told(kind: str) -> None:
    name = {"text": "texts", "audio": "recordings"}[kind]
    samples = clean(kind, 60)
    with pytest.raises(InputError, match=f"feature-squeezing filters images, and this model takes {name}"):
        Guard.fit(classifier(kind), samples, filters=[Strip(), FeatureSqueezing()])
    with pytest.raises(InputError, match=f"only images can be squeezed, and this model takes {name}"):
        Guard.fit(classifier(kind), samples, reform="median-2")
    with pytest.raises(InputError, match=f"the model takes {name}, .* holds images"):
        Guard.fit(classifier(kind), InMemorySamples(np.zeros((9, 8, 8), np.uint8)))
    with pytest.raises(InputError, match=rf"a guard takes {name} \(n, 1, 1, .*, got torch.uint8"):
        Guard.fit(classifier(kind), torch.zeros(9, 1, 1, 9, dtype=torch.uint8))


def test_the_command_line_judges_texts(tmp_path: Path) -> None:
    spec = TextSpec(width=WIDTH, vocabulary=500)
    network = build("text-cnn", spec, classes=2).eval()
    network.get_submodule("linear").weight.data *= 40
    save_native(network, architecture="text-cnn", spec=spec, classes=CLASSES, directory=tmp_path / "model")
    for name, seed in (("clean", 0), ("check", 1)):
        rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts(150, seed)))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    words = ("--clean", tmp_path / "clean.csv", "--check", tmp_path / "check.csv", "--rate", 0.1)
    done = call("guard", tmp_path / "model", *words, "--out", tmp_path / "out", "--fail-on", "never")
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    verdicts = json.loads((tmp_path / "out" / "verdicts.json").read_text())["verdicts"]
    page = (tmp_path / "out" / "rejected.html").read_text()
    rejected = [i for i, one in enumerate(verdicts) if not one["accepted"]]
    assert len(verdicts) == 150
    assert rejected
    assert all(f"<blockquote>{texts(150, 1)[i]}</blockquote>" in page for i in rejected)
    refused = call("guard", tmp_path / "model", *words, "--filter", "feature-squeezing")
    assert refused.code == 2
    assert "feature-squeezing filters images, and this model takes texts" in refused.err
    assert refused.err.count("\n") == 1
