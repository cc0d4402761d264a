"""STRIP: an input whose class hardly changes when other inputs are mixed into it holds a trigger."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.formatting import number
from doorward.detectors._replicas import common_words, rank_words, replace_words
from doorward.detectors._replicas import superimpose as superimpose
from doorward.detectors.inputs.base import InputFilter, Scored, State, finite_logits
from doorward.methods.registry import register
from doorward.models import Classifier, InputSpec
from doorward.models.batching import chunk_images
from doorward.stats.rejection import Floats


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy over the classes in bits, (...), of logits (..., k)."""
    nats: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    return nats / math.log(2)


#: Share of the largest entropy from which on answers are almost random. The published adaptive attack, which
#: gives superimposed images random labels, makes it more than 3.0 of 3.32 bits (Section 6.6).
ALMOST_RANDOM = 0.9
#: What the state holds for each input that is kept.
EACH = ("overlays", "turns")
#: Keeps `0.1 * 30` from counting as less than 3.
ROUNDING = 1e-9
#: What replicas are called.
NOUNS = {"image": "superimposed images", "text": "perturbed texts", "audio": "mixed recordings"}


@register("detector")
class Strip(InputFilter):
    """Mix clean inputs into an input and reject it if the model's answers hardly vary.

    Use it to filter the inputs of a classifier of images, texts or recordings as they arrive, against
    triggers that work in any input.

    An image is added to each of some clean images, pixel by pixel, and a recording to clean recordings,
    sample by sample, with saturation. Of a text, words in random places are replaced by those of a clean text
    that have the highest TF-IDF among the clean texts that are kept. A clean input gets lost in that, so the
    model's answers are uncertain and vary. A trigger survives, and the model stays sure of its target. The
    score is the negative mean entropy of the answers, in bits, over all replicas.

    In short texts several words of a trigger are seldom left together, and in recordings a faint one is
    drowned out: of such inputs most are accepted. The published shares that are accepted (1.1 % of texts,
    3.55 % of recordings) are not reached.

    Replicas are computed in stages, and an input is accepted as soon as the sum of its entropies is high
    enough. It is never rejected early, so an early exit raises no rate of false rejections. Those inputs are
    mixed in first with which the model is least certain of clean ones.

    A `certain` exit is one that no further replica could change. A `calibrated` one is earlier: the sum over
    the first m replicas exceeds a multiple of sqrt(m) that nearly all clean inputs stay below which all
    replicas reject. If one filter rejects by the conformal rule, and clean inputs are exchangeable with those
    it was fitted to, then of the clean inputs that all replicas would reject no more than the share
    `accepted_early` is accepted, on average. Of triggered inputs nothing can be guaranteed: they are rejected
    as before if their entropies add up no faster than those of clean inputs that are rejected.
    """

    title = "STRIP"
    source = (
        "Y. Gao et al., STRIP, ACSAC 2019, arXiv 1902.06531; for texts and recordings Y. Gao et al., "
        "STRIP-ViTA, 2019, arXiv 1911.10312"
    )
    limits = (
        "It misses triggers that work in inputs of some classes only, differ from input to input, or do not "
        "survive the mixture, and models that were trained to be uncertain of triggered mixtures."
    )
    modalities = frozenset({"image", "text", "audio"})
    highest: ClassVar[float] = 0.0

    replicas: int = Field(20, ge=2, le=1000, description="Clean inputs that are mixed into each input")
    weight_input: float = Field(1.0, gt=0, le=1, description="Weight of the input in a sum")
    weight_overlay: float = Field(1.0, gt=0, le=1, description="Weight of the clean input in a sum")
    share_of_words: float = Field(
        0.5, gt=0, le=1, description="Share of a text's words that each replica replaces"
    )
    early_exit: Literal["off", "certain", "calibrated"] = Field(
        "calibrated",
        description="When the rest of the replicas is left out: never, where it cannot change the decision, "
        "or where clean inputs that are rejected hardly ever come",
    )
    accepted_early: float = Field(
        0.15, ge=0, lt=1, description="Share of the rejected clean inputs that a calibrated exit may accept"
    )

    @property
    def kept(self) -> int:
        """Return the number of overlays."""
        return self.replicas

    def keep(self, inputs: Tensor, spec: InputSpec, generator: torch.Generator) -> State:
        """Keep clean inputs (n, c, h, w) as overlays, which all inputs share: of texts the ranked words."""
        state = {"exit": torch.tensor([torch.inf], dtype=torch.float64)}
        if spec.modality == "image":
            return state | {"overlays": inputs.clone()}
        room = (0, spec.width - inputs.shape[-1])
        if spec.modality == "audio":
            return state | {"overlays": pad(inputs, room)}
        words = pad(rank_words(inputs), room)
        turns = torch.stack([torch.randperm(spec.width, generator=generator) for _ in inputs])
        return state | {"overlays": words, "turns": turns, "common": common_words(words)}

    def learn(
        self, classifier: Classifier, inputs: Tensor, generator: torch.Generator, deadline: Deadline | None
    ) -> State:
        """Keep clean inputs (n, c, h, w), those first with which the model is least certain of the others."""
        state = self.keep(inputs, classifier.spec, generator)
        seen = self._entropies(classifier, inputs, state, slice(0, len(inputs)), deadline)  # (n, n)
        order = seen.mean(0).argsort(descending=True, stable=True)
        return {name: kept[order] if name in EACH else kept for name, kept in state.items()}

    def settle(self, state: State, clean: Scored, threshold: float) -> State:
        """Set the multiple of sqrt(m) that few clean inputs exceed among those that all replicas reject."""
        assert clean.parts is not None
        parts = clean.parts[clean.score >= threshold]  # (r, m)
        exceeding = math.floor(self.accepted_early * (len(parts) + 1) + ROUNDING) - 1
        if self.early_exit != "calibrated" or exceeding < 0:  # too few to say
            return state
        ends = np.array([end for _, end in self._stages(parts.shape[1])][:-1])
        highest = (parts.cumsum(1)[:, ends - 1] / np.sqrt(ends)).max(1)  # (r,)
        return {**state, "exit": torch.tensor([np.sort(highest)[-1 - exceeding]], dtype=torch.float64)}

    def warning(self, clean: Floats, classes: int) -> str | None:
        """Return a warning if replicas of clean inputs are answered almost at random."""
        most = math.log2(classes)
        if -clean.mean() < ALMOST_RANDOM * most:
            return None
        mean = f"mean entropy {number(-clean.mean())} of at most {number(most)} bits"
        return (
            f"the model answers mixtures of clean inputs almost at random ({mean}), as models do that were "
            "trained to deceive STRIP"
        )

    def score(
        self,
        classifier: Classifier,
        inputs: Tensor,
        logits: Tensor,
        *,
        state: State,
        threshold: float | None = None,
        deadline: Deadline | None = None,
    ) -> Scored:
        """Return the negative mean entropy (n,) of the replicas of inputs (n, c, h, w)."""
        most = len(state["overlays"])
        seen = torch.zeros(len(inputs), most, dtype=torch.float64)
        used = torch.zeros(len(inputs), dtype=torch.long)
        active = torch.arange(len(inputs))
        for begin, end in self._stages(most):
            if not len(active):
                break
            part = slice(begin, end)
            seen[active, part] = self._entropies(classifier, inputs[active], state, part, deadline)
            used[active] = end
            if threshold is not None and end < most and self.early_exit != "off":
                active = active[~self._accepted(seen[active, :end], -threshold, most, float(state["exit"]))]
        mean = (seen.sum(1) / used.clamp_min(1)).numpy()
        what = NOUNS[classifier.spec.modality]
        told = tuple(
            f"the mean entropy of {n} {what} is {number(h)} bits"
            for n, h in zip(used.tolist(), mean.tolist(), strict=True)
        )
        return Scored(np.negative(mean), told, None if threshold is not None else seen.numpy())

    def _stages(self, most: int) -> list[tuple[int, int]]:
        """Return the replicas of each stage, half as many again in all as after the one before."""
        ends = [most if self.early_exit == "off" else 1]
        while ends[-1] < most:
            ends.append(min(max(ends[-1] + 1, ends[-1] * 3 // 2), most))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _accepted(self, seen: Tensor, boundary: float, most: int, exit_: float) -> Tensor:
        """Return whether inputs (n,) can be accepted by the entropies (n, m) of their first m replicas."""
        total = seen.sum(1)
        accepted = total / most > boundary  # entropies are not negative, so the sum only grows
        if self.early_exit == "calibrated":
            accepted |= total / math.sqrt(seen.shape[1]) > exit_
        return accepted

    def _replicas(self, inputs: Tensor, state: State, part: slice) -> Tensor:
        """Return every input (b, c, h, w) mixed with part of what is kept: (b, m, c, h, w)."""
        overlays = state["overlays"][part]
        if "turns" in state:
            turns, common = state["turns"][part], state["common"]
            return replace_words(inputs, overlays, turns, common, share=self.share_of_words)
        return superimpose(inputs, overlays, weights=(self.weight_input, self.weight_overlay))

    def _entropies(
        self, classifier: Classifier, inputs: Tensor, state: State, part: slice, deadline: Deadline | None
    ) -> Tensor:
        """Return the entropy (n, m) of every input mixed with part of what is kept, some inputs at a time."""
        count = part.stop - part.start
        what = f"running the model on {len(inputs) * count} {NOUNS[classifier.spec.modality]}"
        guard = TimeGuard(deadline or Deadline(), len(inputs), work=what)
        rows = []
        for some in torch.split(inputs, max(1, chunk_images(classifier) // count)):
            mixed = self._replicas(some, state, part).flatten(0, 1)
            rows.append(entropy(finite_logits(classifier, mixed)).view(len(some), -1))
            guard.advance(len(some))
        return torch.cat(rows)
