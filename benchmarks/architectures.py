"""Open small models of the image architectures of transformers, and compare logits with its pipeline's.

    python benchmarks/architectures.py [NAME ...]

builds each architecture with few and random weights, saves it with its image processor as its makers do,
opens the directory as a scan does, and gives the same two images to Doorward and to
`transformers.pipeline("image-classification")`. An architecture passes that gives the pipeline's own logits,
or is refused in one line that says why. Ends with 4 if one gives other logits, or ends in a fault.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measuring

#: Largest difference of a logit from the pipeline's own, as a share of the largest.
TOLERANCE = 1e-3
#: Architectures that must give the pipeline's own logits, or one clear line.
LEAST = 42
CLASSES = ("ant", "bee", "cat", "dog", "eel")


@dataclass(frozen=True)
class Case:
    """A small model of an architecture.

    Attributes:
        settings: of its configuration; the other ones are the usual ones.
        model: name of its class; that which transformers has for the kind if empty.
        kind: name of the architecture in transformers; the case's own if empty.
        processor: name of its image processor; that which transformers has for the kind if empty.
        processing: settings of its image processor.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    kind: str = ""
    processor: str = ""
    processing: dict[str, Any] = field(default_factory=dict)


WIDTH = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN = Case(WIDTH | {"num_hidden_layers": 2})
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2]}
WINDOWS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
VISION = {"vision_config": WIDTH | {"num_hidden_layers": 1, "image_size": 64, "patch_size": 16}}
SMALL = {"size": {"height": 64, "width": 64}}
CUT = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
PERCEIVER = {
    "num_latents": 8, "d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "d_model": 32,
}  # fmt: skip
TIMM = {
    "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "input_size": [3, 64, 64], "crop_pct": 0.9,
    "interpolation": "bicubic",
}  # fmt: skip
LEVIT = {
    "hidden_sizes": [32, 32, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
    "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2],
}  # fmt: skip
EFFICIENT = {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256, "image_size": 64}
RESNET = {"embedding_size": 8, **STAGES}

CASES: dict[str, Case] = {
    **dict.fromkeys(
        "beit data2vec-vision deit dinov2 ijepa vit vit_msn".split(),  # noqa: SIM905
        PLAIN,
    ),
    "dinov2_with_registers": Case(PLAIN.settings, processor="BitImageProcessor"),
    "deit with a teacher": Case(PLAIN.settings, "DeiTForImageClassificationWithTeacher", "deit"),
    "vit of 64 pixels": Case(
        PLAIN.settings | {"image_size": 64, "patch_size": 8}, kind="vit", processing=SMALL
    ),
    "bit": Case({"embedding_size": 32, "hidden_sizes": [32, 32, 32, 64], "depths": [1] * 4, "num_groups": 8}),
    "clip": Case(VISION, processing=CUT),
    "metaclip_2": Case(VISION, processing=CUT),
    "siglip": Case(VISION, processing=SMALL),
    "siglip2": Case(VISION),
    "convnext": Case(STAGES),
    "convnext of 224 pixels": Case(STAGES, kind="convnext", processing={"size": {"shortest_edge": 224}}),
    "convnextv2": Case(STAGES),
    "cvt": Case({"embed_dim": [16, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}),
    "dinat": Case(WINDOWS),
    "donut-swin": Case(WINDOWS),
    "efficientnet": Case(EFFICIENT, processing=SMALL),
    "focalnet": Case(
        {
            "embed_dim": 16,
            "hidden_sizes": [16, 16],
            "depths": [1, 1],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
        },
    ),
    "hgnet_v2": Case(
        {
            "embedding_size": 8,
            "hidden_sizes": [16, 16],
            "depths": [1, 1],
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16],
            "stage_mid_channels": [8, 8],
            "stage_out_channels": [16, 16],
            "stage_num_blocks": [1, 1],
            "stage_downsample": [False, True],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 3],
            "stage_numb_of_layers": [2, 2],
        },
        processor="ViTImageProcessor",
    ),
    "hiera": Case({"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}),
    "imagegpt": Case(
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 64},
        processing={"clusters": [[x / 4 - 1] * 3 for x in range(8)], "size": {"height": 8, "width": 8}},
    ),
    "levit": Case(LEVIT),
    "levit with a teacher": Case(LEVIT, "LevitForImageClassificationWithTeacher", "levit"),
    "mobilenet_v1": Case({"depth_multiplier": 0.25}),
    "mobilenet_v2": Case({"depth_multiplier": 0.35}, processing=CUT),
    "mobilevit": Case({"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32]}),
    "mobilevitv2": Case({"width_multiplier": 0.25}, processing=CUT),
    "perceiver": Case(PERCEIVER | {"image_size": 224}, "PerceiverForImageClassificationLearned"),
    "perceiver with Fourier features": Case(
        PERCEIVER | {"image_size": 64}, "PerceiverForImageClassificationFourier", "perceiver"
    ),
    "perceiver with a convolution": Case(
        PERCEIVER, "PerceiverForImageClassificationConvProcessing", "perceiver"
    ),
    "poolformer": Case(STAGES),
    "pp_lcnet": Case({"scale": 0.25}),
    "pvt": Case(STAGES | HEADS),
    "pvt_v2": Case(STAGES | HEADS),
    "regnet": Case(RESNET | {"groups_width": 8}),
    "resnet": Case(RESNET),
    "resnet of 64 pixels": Case(
        RESNET | {"layer_type": "basic"}, kind="resnet", processing={"size": {"shortest_edge": 64}}
    ),
    "segformer": Case(STAGES | HEADS, processing=SMALL),
    "shieldgemma2": Case(
        {
            "text_config": WIDTH
            | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64},
            "vision_config": WIDTH | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        }
    ),
    "swiftformer": Case({"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
    "swin": Case(WINDOWS),
    "swinv2": Case(WINDOWS),
    "textnet": Case(),
    "timm_wrapper": Case({"architecture": "resnet10t", "model_args": {}, "pretrained_cfg": TIMM}),
}


class NotBuiltError(Exception):
    """Tells why an architecture cannot be built here."""


def build(name: str, folder: Path) -> Any:
    """Write a small model of an architecture with its image processor; return the model.

    Raises:
        NotBuiltError: if it cannot be built, as where a package is missing that it needs.
    """
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    case = CASES[name]
    kind = case.kind or name
    known = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
    model = case.model or (known if isinstance(known, str) else known[0])
    try:
        config = transformers.CONFIG_MAPPING[kind](
            **case.settings, id2label=dict(enumerate(CLASSES)), num_labels=len(CLASSES)
        )
        torch.manual_seed(0)
        network = getattr(transformers, model)(config).eval()
        made = _processor(case, kind)
        enliven(network, made)
        network.save_pretrained(folder)
        if made is not None:
            made.save_pretrained(folder)
    except Exception as error:  # what is not installed, and configurations that do not fit
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return network


def enliven(network: Any, processor: Any | None) -> None:
    """Give a network weights, and statistics of the two images, by which its logits differ between images.

    Untrained networks often shrink whatever passes through, so that any answer would look right.
    """
    import torch
    from torch import nn

    generator, norms = torch.Generator().manual_seed(0), []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.numel():
            nn.init.kaiming_normal_(layer.weight, generator=generator)
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) and layer.running_mean is not None:
            norms.append(layer)
            layer.momentum = None
            layer.reset_running_stats()
    if norms and processor is not None:
        # twice, since some norms take no single image
        given = [processor(images=[image, image], return_tensors="pt") for image in pictures()]
        with torch.no_grad():
            for _ in range(3):  # the statistics of one layer are those of inputs that the former ones made
                for layer in norms:
                    layer.reset_running_stats()
                    layer.train()
                for one in given:
                    network(**one)
        network.eval()


def _processor(case: Case, kind: str) -> Any | None:
    """Return the image processor of a case, in its Pillow form where there is one."""
    import transformers
    from transformers.models.auto import image_processing_auto

    if kind == "timm_wrapper":  # which keeps it in the configuration of the model
        return None
    known = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
    names = [case.processor, f"{case.processor}Pil"] if case.processor else _names(known)
    made = None
    for name in sorted(names, key=lambda one: not one.endswith("Pil")):
        try:
            made = getattr(transformers, name)
            return made(**case.processing)
        except (ImportError, AttributeError) as error:
            problem = error
    if names and made is not None:
        raise ImportError(str(problem))
    return None


def _names(known: Any) -> list[str]:
    found = known.values() if isinstance(known, dict) else known if isinstance(known, tuple) else [known]
    return [name for name in found if name]


def pictures() -> list[Any]:
    """Return two images, coarse and fine, dark and bright, neither square nor of any model's size."""
    import numpy as np

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 128, (4, 5, 3), dtype=np.uint8).repeat(18, 0).repeat(18, 1)  # (72, 90, 3)
    return [coarse, rng.integers(128, 256, (300, 261, 3), dtype=np.uint8)]


def own_logits(network: Any, folder: Path, images: list[Any]) -> Any:
    """Return the logits (n, k) that the pipeline of transformers gives.

    Raises:
        NotBuiltError: if the pipeline itself does not run.
    """
    import torch
    import transformers
    from PIL import Image

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
        classify = transformers.pipeline("image-classification", model=network, image_processor=processor)
        mode = "L" if getattr(network.config, "num_channels", 3) == 1 else "RGB"
        answers = classify(
            [Image.fromarray(image).convert(mode) for image in images],
            function_to_apply="none",
            top_k=len(CLASSES),
        )
    except Exception as error:  # models fail in many kinds
        raise NotBuiltError(f"the pipeline fails: {' '.join(str(error).split())[:200]}") from error
    scores = [{one["label"]: one["score"] for one in answer} for answer in answers]
    return torch.tensor([[row[name] for name in CLASSES] for row in scores])


def measure_one(name: str) -> dict[str, Any]:
    """Build and open one architecture, and compare its logits."""
    import torch

    from doorward.core.errors import DoorwardError
    from doorward.models import open_classifier
    from doorward.models.encode.image import fit_image, to_float
    from doorward.models.formats.huggingface import quiet

    started = time.process_time()
    row: dict[str, Any] = {"architecture": name, "outcome": "", "said": ""}
    with tempfile.TemporaryDirectory() as place, quiet():
        folder = Path(place) / "model"
        try:
            network = build(name, folder)
        except NotBuiltError as error:
            return row | {"outcome": "not built", "said": str(error)}
        images = pictures()
        row["parameters"] = sum(p.numel() for p in network.parameters())
        try:
            classifier = open_classifier(folder)
            spec = classifier.spec
            shown = [image if spec.channels == 3 else _grey(image) for image in images]
            fitted = [torch.from_numpy(fit_image(image, spec).transpose(2, 0, 1).copy()) for image in shown]
            with torch.no_grad():
                ours = classifier.logits(to_float(torch.stack(fitted)))
            row |= {"input": list(spec.shape), "gradients": "gradients" in classifier.capabilities}
        except DoorwardError as error:
            said = str(error).replace(str(folder), "MODEL")
            return row | {"outcome": "refused" if "\n" not in said else "many lines", "said": said}
        except Exception as error:  # a fault is what this looks for
            return row | {"outcome": "fault", "said": f"{type(error).__name__}: {error}"[:300]}
        try:
            own = own_logits(network, folder, images)
        except NotBuiltError as error:
            return row | {"outcome": "no pipeline", "said": str(error)}
        row |= {"largest": float(own.abs().max()), "apart": float((own[0] - own[1]).abs().max())}
        row["difference"] = float((ours - own).abs().max()) / max(row["largest"], 1e-30)
        row["outcome"] = "same logits" if row["difference"] <= TOLERANCE else "other logits"
        if not row["apart"] > 10 * TOLERANCE * row["largest"]:
            row["outcome"] = "any image gives these logits"
        row["cpu_seconds"] = round(time.process_time() - started, 1)
    return row


def _grey(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Yield what is not as it must be."""
    rows = results["rows"]
    for row in rows:
        if row["outcome"] not in ("same logits", "refused", "not built", "no pipeline"):
            yield f"{row['architecture']}: {row['outcome']} {row['said']}"
    passed = sum(row["outcome"] in ("same logits", "refused") for row in rows)
    if len(rows) == len(CASES) and passed < LEAST:
        yield f"{passed} of {len(rows)} architectures give the pipeline's logits or one line, {LEAST} must"


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows = [
        [
            row["architecture"],
            "x".join(map(str, row.get("input", []))),
            row["outcome"],
            f"{row['difference']:.0e}" if "difference" in row else "",
            row["said"],
        ]
        for row in results["rows"]
    ]
    return measuring.markdown(["architecture", "input", "outcome", "difference", "what is said"], rows)


def main() -> None:
    """Measure, write the results, and end with 4 if anything is not as it must be."""
    made = measuring.parser(__doc__, threads=1)
    made.add_argument("names", nargs="*", metavar="NAME", help="architectures; all if there are none")
    options = measuring.here(made)
    results = measuring.begin(options.threads) | {"tolerance": TOLERANCE, "rows": []}
    for name in options.names or CASES:
        results["rows"].append(measure_one(name))
        row = results["rows"][-1]
        print(f"{name}: {row['outcome']} {row['said']}", file=sys.stderr, flush=True)
    if options.names:
        print(table(results))
        raise SystemExit(4 if list(failures(results)) else 0)
    measuring.conclude("architectures", results, table(results), failures(results))


if __name__ == "__main__":
    main()
