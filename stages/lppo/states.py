"""From scenes to states (e_T, P(e_l)): encode once, project many.

The frozen encoder has run once over every image before training begins; here exit features are read from the memory-
mapped cache and projected. The tower is never called.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.lppo.policy import Policy
from stages.lppo.rollout import Prefixes, Scene, pack_prefixes
from stages.models.features import Features


class States:
    """Packs scenes for a policy.

    Args:
        features: of the images that scenes number.
    """

    def __init__(self, policy: Policy, features: Features):
        self._policy = policy
        self._features = features
        self._before = policy.before_image()

    def __call__(self, scenes: Sequence[Scene], samples: int) -> Prefixes:
        """The states of some scenes, laid out for `samples` responses to each prompt."""
        import torch

        # Nothing up to here is trained; gradient checkpointing would ask embeddings for a gradient.
        with torch.no_grad():
            images = [
                self._policy.image(
                    torch.from_numpy(np.array(self._features[scene.image, scene.exit])),
                    self._features.geometry(scene.image),
                )
                for scene in scenes
            ]
            prompts = [[self._policy.after_image(prompt.text) for prompt in scene.prompts] for scene in scenes]
            return pack_prefixes(self._before, images, prompts, samples)
