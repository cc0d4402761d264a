"""MITRE ATLAS: the one table of the technique and mitigation ids that Doorward names.

Source: MITRE ATLAS data, version 5.6.0. Later versions renumber some of them, so reports say the version.
"""

from __future__ import annotations

from dataclasses import dataclass

from doorward.core.errors import InputError

VERSION = "5.6.0"
HOME = "https://atlas.mitre.org"


@dataclass(frozen=True)
class Entry:
    """One technique or mitigation. A sub-technique has the tactics of its technique."""

    id: str
    name: str
    tactics: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Return the address of its page."""
        room = "mitigations" if self.id.startswith("AML.M") else "techniques"
        return f"{HOME}/{room}/{self.id}"

    @property
    def title(self) -> str:
        """Return the name, after its technique's for a sub-technique."""
        technique = self.id[: len("AML.T0000")]
        return self.name if technique == self.id else f"{ENTRIES[technique].name}: {self.name}"


_SUPPLY_CHAIN = ("Initial Access",)
_MANIPULATE = ("Persistence", "AI Attack Staging")

_ENTRIES = (
    Entry("AML.T0010", "AI Supply Chain Compromise", _SUPPLY_CHAIN),
    Entry("AML.T0010.002", "Data", _SUPPLY_CHAIN),
    Entry("AML.T0010.003", "Model", _SUPPLY_CHAIN),
    Entry("AML.T0011", "User Execution", ("Execution",)),
    Entry("AML.T0011.000", "Unsafe AI Artifacts", ("Execution",)),
    Entry("AML.T0015", "Evade AI Model", ("Initial Access", "Defense Evasion", "Impact")),
    Entry("AML.T0018", "Manipulate AI Model", _MANIPULATE),
    Entry("AML.T0018.000", "Poison AI Model", _MANIPULATE),
    Entry("AML.T0018.001", "Modify AI Model Architecture", _MANIPULATE),
    Entry("AML.T0018.002", "Embed Malware", _MANIPULATE),
    Entry("AML.T0019", "Publish Poisoned Datasets", ("Resource Development",)),
    Entry("AML.T0020", "Poison Training Data", ("Resource Development", "Persistence")),
    Entry("AML.T0031", "Erode AI Model Integrity", ("Impact",)),
    Entry("AML.T0040", "AI Model Inference API Access", ("AI Model Access",)),
    Entry("AML.T0041", "Physical Environment Access", ("AI Model Access",)),
    Entry("AML.T0043", "Craft Adversarial Data", ("AI Attack Staging",)),
    Entry("AML.T0043.004", "Insert Backdoor Trigger", ("AI Attack Staging",)),
    Entry("AML.T0044", "Full AI Model Access", ("AI Model Access",)),
    Entry("AML.T0058", "Publish Poisoned Models", ("Resource Development",)),
    Entry("AML.T0059", "Erode Dataset Integrity", ("Impact",)),
    Entry("AML.M0003", "Model Hardening"),
    Entry("AML.M0005", "Control Access to AI Models and Data at Rest"),
    Entry("AML.M0007", "Sanitize Training Data"),
    Entry("AML.M0008", "Validate AI Model"),
    Entry("AML.M0010", "Input Restoration"),
    Entry("AML.M0013", "Code Signing"),
    Entry("AML.M0014", "Verify AI Artifacts"),
    Entry("AML.M0015", "Adversarial Input Detection"),
    Entry("AML.M0023", "AI Bill of Materials"),
    Entry("AML.M0025", "Maintain AI Dataset Provenance"),
)

#: Every technique and mitigation by its id.
ENTRIES = {entry.id: entry for entry in _ENTRIES}


def lookup(identifier: str) -> Entry:
    """Return the technique or mitigation of that id.

    Raises:
        InputError: if the table has no such id.
    """
    if identifier not in ENTRIES:
        raise InputError(
            f"{identifier!r} is no technique or mitigation of MITRE ATLAS {VERSION} that Doorward knows"
        )
    return ENTRIES[identifier]
