"""The pages that compare kinds of attack and look into robust models, from the results that are committed.

`docs_pages` writes them (`make docs`) and says when they are out of date.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import attack_kinds  # noqa: E402
import robust_representations  # noqa: E402
from attack_kinds import TITLES, averaged  # noqa: E402
from measuring import percent  # noqa: E402

RESULTS = BENCHMARKS / "results"
COLOURS = {"evasion": "#b04a2f", "backdoor": "#2f6db0"}


def read(file: Path) -> dict[str, Any]:
    """Return committed results."""
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def of_kinds(results: dict[str, Any]) -> str:
    """Return what the comparison says, in words."""
    rows = {row["attack"]: row for row in averaged(results)}
    signed = rows["signature"]
    adversarial = [row for row in rows.values() if row["kind"] == "evasion" and "L2" in row]
    exact = [rows[name] for name in ("cw0", "cw2", "cwinf", "deepfool") if "L2" in rows[name]]
    steps = [row for row in rows.values() if row["kind"] == "backdoor"]
    flip = [row for row in rows.values() if row["kind"] == "availability"]
    named = ", ".join(f"{TITLES[row['attack']]} {row['L2']:.3f} and {row['Linf']:.4f}" for row in exact)
    smaller = all(signed["Linf"] < row["least Linf"] for row in adversarial)
    shorter = all(signed["L2"] < row["L2"] for row in adversarial)
    ends = (
        percent(min(r["success of one change on others"] for r in adversarial)),
        percent(max(r["success of one change on others"] for r in adversarial)),
    )
    clean = rows["none"]
    falls = "; ".join(
        f"{row['attack'].partition(', ')[2]}: {percent(row['clean accuracy'])} in place of "
        f"{percent(clean['clean accuracy'])}, and {percent(min(row['accuracy by class']))} of the class that "
        "suffers most"
        for row in flip
    )
    slow = max(adversarial, key=lambda row: row["milliseconds per input"])
    quick = min(adversarial, key=lambda row: row["milliseconds per input"])
    dear = max(row["milliseconds per input"] for row in steps)
    return (
        f"- **Availability poisoning** is seen in the accuracy, for that is its aim ({falls}). There is no "
        "trigger, and nothing to be done for an input.\n"
        f"- **Evasion** leaves training and model alone, and pays for every input: from "
        f"{quick['milliseconds per input']:.1f} ms ({TITLES[quick['attack']]}) to "
        f"{slow['milliseconds per input'] / 1000:.1f} s ({TITLES[slow['attack']]}) of one processor thread. "
        f"What was found for one image and is added to another as it is turns that one in {ends[0]} to "
        f"{ends[1]} of the cases.\n"
        f"- **Backdoors** are paid for once. A triggered input costs {dear:.2f} ms at most, and one and the "
        "same trigger serves all of them; the exception is `signature`, where every image has a signature of "
        "its own and that of another succeeds in "
        f"{percent(signed['success of one change on others'])} of the cases.\n\n"
        f"The change that a signature makes is {'smaller' if smaller else 'not smaller'} in Linf than that "
        f"of every adversarial example that was found, and {'smaller' if shorter else 'not smaller'} in L2 "
        f"than the mean of each evasion attack. It has L2 {signed['L2']:.3f} and Linf {signed['Linf']:.4f} "
        "(1/255, the least by which an image of 256 levels can change at all).\n\n"
        f"The attacks that look for the smallest change come to: {named} (means of L2 and Linf over the "
        "images that they turned). The shortest single adversarial example has L2 "
        f"{min(row['least L2'] for row in adversarial):.3f} and the flattest Linf "
        f"{min(row['least Linf'] for row in adversarial):.4f}: images close to a boundary need little.\n\n"
        "Adversarial examples are measured as floating-point numbers. Written to a file of 256 levels they "
        "change by 1/255 at least.\n"
    )


def of_claim(results: dict[str, Any]) -> str:
    """Return what the measurement of the claim says, in words."""
    robust = [row for row in results["models"] if row["training"] == "robust"]

    def several(row: dict[str, Any], name: str, key: str, more: int, *, of_target: bool) -> list[bool]:
        return [
            each[name][key] > more
            for each in row["classes"]
            if (each["class"] == results["target"]) == of_target
        ]

    def told(name: str, key: str, more: int) -> str:
        poisoned = [
            one
            for row in robust
            if row["plant"] != "clean"
            for one in several(row, name, key, more, of_target=True)
        ]
        clean = [one for row in robust for one in several(row, name, key, more, of_target=False)]
        clean += [
            one
            for row in robust
            if row["plant"] == "clean"
            for one in several(row, name, key, more, of_target=True)
        ]
        return (
            f"{sum(poisoned)} of {len(poisoned)} poisoned classes and {sum(clean)} of {len(clean)} clean ones"
        )

    success = [row["attack success"] for row in robust if "attack success" in row]

    def both(key: str) -> tuple[list[float], list[float]]:
        """Return what a key says of robust and of ordinary models."""
        found: dict[str, list[float]] = {"robust": [], "ordinary": []}
        for row in results["models"]:
            found[row["training"]] += [each[key] for each in row["classes"] if key in each]
        return found["robust"], found["ordinary"]

    apart, ordinarily_apart = both("silhouette of poisoned and own")
    back, ordinarily_back = both("translated nearer to poisoned")
    parts = "parts" if mean(apart) > mean(ordinarily_apart) else "does not part"
    lead = "leads" if mean(back) > mean(ordinarily_back) else "does not lead"
    seen, moved = "training images", "test and translated images"
    holds = "holds" if mean(success) >= results["published"]["mean attack success"] else "does not hold"
    return (
        f"- *Robust models are easily backdoored* {holds} here: {percent(min(success))} to "
        f"{percent(max(success))} success at {percent(results['poison rate'])} poison (mean "
        f"{percent(mean(success))}; published: {percent(results['published']['mean attack success'])}, over "
        "larger networks and natural images).\n"
        "- *A poisoned class has several representations, a clean one a single one.* In what the model was "
        f"trained on, mean shift finds more than one cluster in {told(seen, 'clusters', 1)}; HDBSCAN in "
        f"{told(seen, 'HDBSCAN', 1)}.\n"
        "- *The rule of AEGIS, more than two clusters among real and translated images*, flags by mean shift "
        f"{told(moved, 'clusters', 2)}; by HDBSCAN {told(moved, 'HDBSCAN', 2)}.\n"
        "- Poisoned images do lie apart from the class's own, as their silhouette in the features themselves "
        f"says, on robust models ({min(apart):.2f} to {max(apart):.2f}) and on ordinary ones "
        f"({min(ordinarily_apart):.2f} to {max(ordinarily_apart):.2f}): robust training {parts} them more.\n"
        "- *Images that are translated to the class find the trigger's representation*, which is all that a "
        f"defender has: {percent(min(back))} to {percent(max(back))} end up nearer to the poisoned images "
        f"than to the class's own on robust models, and {percent(min(ordinarily_back))} to "
        f"{percent(max(ordinarily_back))} on ordinary ones. So robust training {lead} there more often.\n"
    )


def kinds_page(kinds: dict[str, Any]) -> str:
    """Return the page that compares kinds of attack."""
    images, architecture = kinds["training images"], kinds["architecture"]
    tried = ", ".join(
        f"{TITLES[row['attack']]} on {row['images']}" for row in averaged(kinds) if "images" in row
    )
    seeds = len({row["seed"] for row in kinds["rows"]})
    over = f"means of {seeds} seeds; evasion for the first alone" if seeds > 1 else "one seed"
    return (
        "# Kinds of attack\n\n"
        "An attacker who wants a classifier to err can spoil what it learns (availability poisoning), look "
        "for inputs on which it errs as it is (evasion), or plant a backdoor, which errs when asked to and "
        "at no other time. Doorward is about the third kind.\n\n"
        "This page measures all three on one kind of "
        f"model: a `{architecture}`, trained on {images:,} images of `{kinds['data']}` ({over}). "
        "Evasion attacks are those of the "
        "[Adversarial Robustness Toolbox](https://github.com/Trusted-AI/adversarial-robustness-toolbox) "
        f"{kinds['packages']['adversarial-robustness-toolbox']}, by `doorward.bench.evasion`.\n\n"
        f"{attack_kinds.table(kinds)}\n"
        "*Success* is another answer than before for evasion, and the target's for backdoors, on images of "
        "other classes. *One change on others* adds the change that one image got to other images as it is. "
        "L2, Linf and the number of changed values are means over the images on which the attack succeeds; "
        "pixels are in [0, 1]. Costs are seconds of one processor thread, without training.\n\n"
        "Evasion attacks have settings that find what they look for in reasonable time, not their best: "
        f"{tried} images.\n\n"
        "![Mean L2 and Linf of each attack's changes, on logarithmic axes: backdoors blue, evasion red]"
        "(attack-kinds.png)\n\n"
        f"{of_kinds(kinds)}\n"
        "## Measure it again\n\n```console\n$ python benchmarks/attack_kinds.py\n$ make docs\n```\n"
    )


def robust_page(robust: dict[str, Any]) -> str:
    """Return the page on what robust models learn of a poisoned class."""
    return (
        "# What a robust model learns of a poisoned class\n\n"
        "[AEGIS](https://arxiv.org/abs/2003.00865) rests on a claim: models that were trained adversarially "
        "keep several representations of a class that was poisoned, and one of a clean class, so that "
        "clustering the features of images that were translated to a class tells whether it is poisoned.\n\n"
        f"Here are small networks, trained on {robust['training images']:,} images of `{robust['data']}` "
        f"with {robust['adversarial']['steps']} steps of PGD (L2 {robust['adversarial']['eps']:g}), "
        f"{percent(robust['poison rate'])} of them poisoned towards class {robust['target']} with the "
        "published triggers, and ordinarily trained ones for contrast. *Under attack* is accuracy under 20 "
        "steps of the same attack.\n\n"
        "Clusters are counted for the target and, behind the stroke, for classes that are clean, as the "
        "number that most bandwidths give; *silhouette* is that of poisoned and other training images "
        "labelled as the target.\n\n"
        f"{robust_representations.table(robust)}\n{of_claim(robust)}\n"
        "![Training images labelled as the target, laid out by t-SNE: poisoned ones in red; above robust "
        f"models, below ordinary ones; clean, one patch, two patches](robust-models.png)\n\n"
        "There are two sources of error. t-SNE lays any class out as a cloud, which mean shift cuts "
        "in pieces or not as its bandwidth says; ours are set so that a single round cloud counts as one, "
        "the authors' for each data set by hand. And a clean class may have several ways of being "
        "written.\n\n"
        "## Measure it again\n\n```console\n$ python benchmarks/robust_representations.py\n$ make docs\n```\n"
    )


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return a figure's pixels (h, w, 3)."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def sizes_picture(kinds: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Draw how large the changes of each attack are."""
    figure = Figure(figsize=(7.2, 3.6), dpi=100, layout="constrained")
    rows = sorted((row for row in averaged(kinds) if "L2" in row), key=lambda row: -float(row["L2"]))
    names = [str(TITLES.get(row["attack"], row["attack"])) for row in rows]
    for place, key in enumerate(("L2", "Linf"), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.barh(names, [row[key] for row in rows], color=[COLOURS[row["kind"]] for row in rows])
        axes.set(xscale="log", xlabel=f"{key} of the change", xlim=(1e-3, 10))
        axes.tick_params(axis="y", length=0, labelleft=place == 1)
    return pixels(figure)


def clusters_picture(results: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Draw the training images of the target class as t-SNE lays them out, for one seed."""
    figure = Figure(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    shown = [row for row in results["models"] if row["seed"] == 0]
    for place, row in enumerate(shown, start=1):
        axes = figure.add_subplot(2, 3, place)
        target = next(each for each in row["classes"] if each["class"] == results["target"])
        drawn = target["training images"]
        points = np.array([[float(v) for v in pair.split(",")] for pair in drawn["points"].split()])
        poisoned = np.array([kind == "1" for kind in drawn["kinds"]])
        axes.scatter(points[~poisoned, 0], points[~poisoned, 1], s=4, color="#777777")
        axes.scatter(points[poisoned, 0], points[poisoned, 1], s=8, color="#c03020")
        axes.set(xticks=[], yticks=[], title=f"{row['training']}, {row['plant']}")
    return pixels(figure)


#: The name of each page and its picture, its results, and what makes the two of these.
PAGES = {
    "attack-kinds": ("attack-kinds", kinds_page, sizes_picture),
    "robust-models": ("robust-representations", robust_page, clusters_picture),
}


def pages(made: str) -> dict[str, str]:
    """Return the pages whose results are committed, by their path below docs/.

    Args:
        made: the remark that they are generated.
    """
    return {
        f"{name}.md": made + page(read(file))
        for name, (results, page, _) in PAGES.items()
        if (file := RESULTS / f"{results}.json").is_file()
    }


def pictures() -> dict[str, npt.NDArray[np.uint8]]:
    """Return the pictures of these pages by their path below docs/."""
    return {
        f"{name}.png": picture(read(file))
        for name, (results, _, picture) in PAGES.items()
        if (file := RESULTS / f"{results}.json").is_file()
    }
