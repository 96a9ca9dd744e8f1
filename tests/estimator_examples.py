"""Small problems of ridge regression and classification."""

import numpy as np

from ntkdask.features import ArcCosineFeatures

ALPHAS = (1e-2, 1.0, 1e2)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 6)) + 1.0
Y2 = X @ RNG.normal(size=(6, 2)) + 0.5 * RNG.normal(size=(90, 2)) + 3.0
Y = Y2[:, 0]
LABELS = np.array(["ant", "bee", "cow"])[np.argmax(X[:, :3] + 0.3 * RNG.normal(size=(90, 3)), axis=1)]
WEIGHTS = RNG.integers(0, 4, 90).astype(float)
IMAGES = RNG.integers(0, 256, (40, 4, 4, 3)).astype(np.uint8)
MAP = ArcCosineFeatures(32)
