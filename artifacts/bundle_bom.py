"""The bill of materials: a CycloneDX 1.6 ML-BOM of a bundle (`bom.cdx.json`).

The library has no model cards yet; that one object is added to its output, in the form of the 1.6 schema. No time and
no random serial number: the same bundle gives the same text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Final

from artifacts.card import Card, spdx
from artifacts.manifest import canonical_json

BOM_NAME: Final = "bom.cdx.json"


def bill_of_materials(card: Card, artifact: str, files: Mapping[str, str]) -> bytes:
    """The BOM as JSON.

    Args:
        artifact: digest of the shipped artifact.
        files: name -> SHA-256 of the model's files.
    """
    from cyclonedx.factory.license import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.output.json import JsonV1Dot6

    def hashes(digest: str) -> list[HashType]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=digest)]

    model = Component(
        name=card.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"model-{artifact}",
        hashes=hashes(artifact),
        licenses=[LicenseFactory().make_from_string(spdx(card.licence))],
        pedigree=Pedigree(
            ancestors=[
                Component(name=name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=f"base-{name}")
                for name in card.base_models or (card.source,)
            ]
        ),
        properties=[Property(name=f"icet-pipeline:{step.id}", value=step.uses) for step in card.steps],
    )
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"icet-pipeline:{artifact}"))
    bom.metadata.component = model
    parts = [
        Component(name=name, type=ComponentType.FILE, bom_ref=f"file-{name}", hashes=hashes(digest))
        for name, digest in sorted(files.items())
    ]
    tools = [
        Component(name=name, version=number, type=ComponentType.LIBRARY, bom_ref=f"tool-{name}")
        for name, number in sorted(card.tools.items())
    ]
    for component in (*parts, *tools):
        bom.components.add(component)
    bom.register_dependency(model, parts)
    content: dict[str, dict[str, dict[str, object]]] = json.loads(JsonV1Dot6(bom).output_as_string())
    content["metadata"].pop("timestamp", None)
    content["metadata"]["component"]["modelCard"] = _model_card(card)
    return canonical_json(content)


def _model_card(card: Card) -> dict[str, object]:
    return {
        "modelParameters": {
            "task": "image-text-to-text" if card.sees_images else "text-generation",
            "inputs": [{"format": "text"}, *([{"format": "image"}] if card.sees_images else [])],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": gate.name, "value": str(gate.value), "slice": "the files that ship"}
                for gate in card.gates
                if gate.value is not None
            ]
        },
        "considerations": {"technicalLimitations": [gate.reason for gate in card.gates if not gate.passed]},
    }
