"""Hugging Face text and audio directories: outputs are those of transformers, and what lacks is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import assert_one_line, call
from doorward.core.errors import InputError
from doorward.data import InMemorySamples, Waveform
from doorward.data.parquet import write_parquet
from doorward.models import LoadOptions, open_classifier
from doorward.models.encode import dispatch
from doorward.training import evaluate, predict

transformers = pytest.importorskip("transformers")

from doorward.models.formats.huggingface import quiet  # noqa: E402 - after the check that transformers is there

LABELS = {0: "neg", 1: "pos"}
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the", ".", "very")
TEXTS = ("a good film .", "The very BAD film", "", "good " * 60, "unheard of")
LONGEST = 32
SMALL = {"vocab_size": len(TOKENS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "Bert": SMALL | {"intermediate_size": 32, "max_position_embeddings": LONGEST},
    "DistilBert": {
        "vocab_size": len(TOKENS), "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32,
        "max_position_embeddings": LONGEST,
    },
    # its places are counted from the padding's number on
    "Roberta": SMALL
    | {
        "intermediate_size": 32, "max_position_embeddings": LONGEST + 2, "pad_token_id": 1,
        "type_vocab_size": 2,
    },
}  # fmt: skip
AUDIO_MODELS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "Wav2Vec2": (
        "Wav2Vec2ForSequenceClassification",
        {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
        },
        "Wav2Vec2FeatureExtractor",
        {"sampling_rate": 16000, "do_normalize": True},
    ),
    "AST": (
        "ASTForAudioClassification",
        {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "max_length": 64, "num_mel_bins": 32,
        },
        "ASTFeatureExtractor",
        {"num_mel_bins": 32, "max_length": 64},
    ),
}  # fmt: skip


def scattered(module: Any) -> Any:
    """Give a module weights large enough that its outputs differ clearly."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                )
    return module.eval()


def save_text(name: str, path: Path, **changes: Any) -> tuple[Any, Any]:
    """Write a text model and its tokenizer; return both."""
    with quiet():
        config = getattr(transformers, f"{name}Config")(**TEXT_MODELS[name] | changes, id2label=LABELS)
        module = scattered(getattr(transformers, f"{name}ForSequenceClassification")(config))
        module.save_pretrained(path)
        tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(TOKENS)})
        tokenizer.save_pretrained(path)
    return module, tokenizer


def save_audio(name: str, path: Path) -> tuple[Any, Any]:
    """Write an audio model and its feature extractor; return both."""
    kind, settings, extractor, given = AUDIO_MODELS[name]
    with quiet():
        config = getattr(transformers, f"{name}Config")(**settings, id2label=LABELS)
        module = scattered(getattr(transformers, kind)(config))
        module.save_pretrained(path)
        own = getattr(transformers, extractor)(**given)
        own.save_pretrained(path)
    return module, own


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "model"
    save_text("Bert", path)
    return path


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    """Return a copy to be damaged."""
    return shutil.copytree(bert, tmp_path / "copy")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_text_model_answers_as_with_its_own_tokenizer(name: str, tmp_path: Path) -> None:
    module, tokenizer = save_text(name, tmp_path)
    classifier = open_classifier(tmp_path)
    assert (classifier.format, classifier.classes) == ("huggingface", ("neg", "pos"))
    assert classifier.capabilities == {"graph", "weights", "features", "probabilities"}
    assert classifier.spec.width == LONGEST
    samples = InMemorySamples(list(TEXTS), [0, 1, 0, 1, 0], classes=classifier.classes, modality="text")
    x = dispatch.to_float(dispatch.to_tensor(samples, classifier.spec), classifier.spec)
    with torch.no_grad():
        ours = classifier.logits(x)
        own = torch.cat(
            [
                module(**tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")).logits
                for text in TEXTS
            ]
        )
    assert own.std() > 0.01
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)
    assert predict(classifier, samples).tolist() == own.argmax(1).tolist()
    assert evaluate(classifier, samples).n == 5
    assert classifier.features(x).shape == (5, 16)


@pytest.mark.parametrize("padding", [None, TOKENS.index("[MASK]")])
def test_a_model_that_answers_at_the_last_token_answers_as_for_each_text_alone(
    padding: int | None, tmp_path: Path
) -> None:
    with quiet():
        config = transformers.GPT2Config(
            vocab_size=len(TOKENS), n_positions=LONGEST, n_embd=16, n_layer=1, n_head=2, pad_token_id=padding,
            id2label=LABELS,
        )  # fmt: skip
        module = scattered(transformers.GPT2ForSequenceClassification(config))
        module.save_pretrained(tmp_path)
        tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(TOKENS)})
        tokenizer.save_pretrained(tmp_path)  # its own padding is another
    classifier = open_classifier(tmp_path)
    assert classifier.spec.width == LONGEST, "the places that the model has"
    samples = InMemorySamples(list(TEXTS), modality="text")
    x = dispatch.to_float(dispatch.to_tensor(samples, classifier.spec), classifier.spec)
    problem = {
        "truncation": True,
        "max_length": LONGEST,
        "return_tensors": "pt",
        "return_token_type_ids": False,
    }
    with torch.no_grad():
        own = torch.cat([module(**tokenizer(text, **problem)).logits for text in TEXTS])
        torch.testing.assert_close(classifier.logits(x), own, atol=1e-5, rtol=1e-4)
    assert own.std() > 0.01


@pytest.mark.parametrize("name", AUDIO_MODELS)
def test_an_audio_model_answers_as_with_its_own_feature_extractor(name: str, tmp_path: Path) -> None:
    module, extractor = save_audio(name, tmp_path)
    classifier = open_classifier(tmp_path)
    assert classifier.capabilities == {"graph", "weights", "features", "probabilities"}
    rng = np.random.default_rng(0)
    sounds = [(rng.integers(-9000, 9000, n) / 32768).astype(np.float32) for n in (16000, 8000, 4001)]
    samples = InMemorySamples(
        [Waveform(pcm, 16000) for pcm in sounds], [0, 1, 0], classes=classifier.classes, modality="audio"
    )
    x = dispatch.to_float(dispatch.to_tensor(samples, classifier.spec), classifier.spec)
    with torch.no_grad():
        ours = classifier.logits(x)
        own = torch.cat(
            [module(**extractor(pcm, sampling_rate=16000, return_tensors="pt")).logits for pcm in sounds]
        )
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)
    assert len(classifier.features(x)) == 3
    short = InMemorySamples([Waveform(np.zeros(3, np.float32), 8000)], [0], modality="audio")
    assert len(predict(classifier, short)) == 1, "too short for the model, so filled up with silence"


def test_stated_labels_and_outputs_are_taken(bert: Path) -> None:
    classifier = open_classifier(bert, options=LoadOptions(labels=("no", "yes")))
    assert classifier.classes == ("no", "yes")
    with pytest.raises(InputError, match="3 labels for a model that tells 2 classes apart"):
        open_classifier(bert, options=LoadOptions(labels=("a", "b", "c")))
    with pytest.raises(InputError, match="--size goes with models of images; this one takes text"):
        open_classifier(bert, options=LoadOptions(size=(1, 28, 28)))


def without_tokenizer(path: Path) -> None:
    for file in (*path.glob("tokenizer*"), *path.glob("vocab*")):
        file.unlink()


def with_many_tokens(path: Path) -> None:
    many = {word: i for i, word in enumerate((*TOKENS, "one", "more"))}
    transformers.BertTokenizerFast(vocab=many).save_pretrained(path)


def with_torn_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")


def with_other_weights(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "no tokenizer: expected one of tokenizer.json"),
        (with_torn_tokenizer, "its tokenizer cannot be made"),
        (with_many_tokens, "the tokenizer has tokens up to 13, and the model 12 of them"),
        (with_other_weights, "another shape"),
    ],
)
def test_a_damaged_text_model_is_one_line(damage: Callable[[Path], None], message: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(InputError, match=message) as error:
        open_classifier(copied)
    assert "\n" not in str(error.value)


def test_an_audio_model_without_a_feature_extractor_is_one_line(tmp_path: Path) -> None:
    save_audio("AST", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="its feature extractor cannot be made"):
        open_classifier(tmp_path)


def test_a_scan_says_what_it_could_examine(bert: Path, tmp_path: Path) -> None:
    samples = InMemorySamples(
        ["good film", "bad film"] * 10, [1, 0] * 10, classes=("neg", "pos"), modality="text"
    )
    write_parquet(samples, tmp_path / "data", split="test")
    done = call("scan", bert, "--clean", tmp_path / "data", "--format", "json")
    assert done.code == 3
    report = json.loads(done.out)
    assert report["verdict"] == "could_not_tell"
    assert "this model takes texts" in report["reason"]
    assert report["subject"]["spec"]["modality"] == "text"
    assert report["subject"]["clean_accuracy"]["n"] == 20
    assert [finding["detector"] for finding in report["findings"]] == ["unsafe-code"]
    assert {one["detector"] for one in report["not_run"]} >= {"max-margin", "neural-cleanse"}
    write_parquet(
        InMemorySamples(np.zeros((4, 16, 16), np.uint8), [0, 1, 0, 1]), tmp_path / "images", split="test"
    )
    wrong = call("scan", bert, "--clean", tmp_path / "images")
    assert_one_line(wrong, "the model takes texts", "holds images")
