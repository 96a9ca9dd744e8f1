"""Epochs of training against gradient descent in arrays, evaluation, targets, and rows that stay as they were."""

import math

import numpy as np
import pytest
from training_examples import SHORT, data, linear, resnet

from ntkdask import seeds
from ntkdask.modules.protocol import TrainingProtocol

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from torch import nn  # noqa: E402 (where torch is)

from ntkdask.modules.training import Training  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_epochs_against_gradient_descent_in_arrays(loss):
    """Momentum, weight decay, batches in the order of the seed, the last one ragged; a linear module has its gradients by hand."""
    protocol = TrainingProtocol(2, 8, 0.3, None, 0.8, 0.01, (), loss)
    x, labels = data(21, (4,))
    x = x.astype("float64")
    module = linear()
    weighted = module[1]
    scale_in, scale_out = weighted.scale_in, weighted.scale_out
    theta = [p.detach().numpy().copy() for p in module.parameters()]
    training = Training(module, protocol, x, labels, seed=5)
    velocity = None
    onehot = np.eye(3)[labels]
    for epoch in (1, 2):
        order, losses, hits = seeds.permutation(5, ("training", "order", epoch), 21), 0.0, 0
        for start in range(0, 21, 8):
            rows = order[start : start + 8]
            a, y = x[rows] * scale_in, onehot[rows]
            f = (a @ theta[0].T + theta[1]) * scale_out
            if loss == "squared":
                losses += 0.5 * ((f - y) ** 2).sum()
                g = (f - y) / len(rows)
            else:
                losses -= (y * np.log(softmax(f))).sum()
                g = (softmax(f) - y) / len(rows)
            hits += (f.argmax(1) == labels[rows]).sum()
            gradients = [scale_out * g.T @ a + 0.01 * theta[0], scale_out * g.sum(0) + 0.01 * theta[1]]
            velocity = [g + (0.8 * v if velocity else 0) for g, v in zip(gradients, velocity or gradients, strict=True)]
            theta = [t - 0.3 * v for t, v in zip(theta, velocity, strict=True)]
        score = training.epoch(epoch)
        assert score.loss == pytest.approx(losses / 21, rel=1e-12)
        assert score.accuracy == hits / 21
    for parameter, expected in zip(module.parameters(), theta, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-11)


def test_evaluation_is_in_eval_mode_whatever_the_batches():
    x, labels = data(9)
    module = resnet()
    training = Training(module, SHORT, x, labels, 0)
    training.epoch(1)
    with torch.no_grad():
        outputs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).double().numpy()
    score = training.evaluate(training.examples)
    expected = -np.log(softmax(outputs))[np.arange(9), labels].mean()
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert score.accuracy == (outputs.argmax(1) == labels).mean()


def test_rows_are_never_written_to():
    x, labels = data(shape=(4,))
    module, before = nn.Sequential(nn.ReLU(inplace=True), linear(dtype="float32")), x.copy()
    training = Training(module, SHORT, x, labels, 0)
    training.evaluate(training.examples)
    training.epoch(1)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(training.examples.x.numpy(), before)


def test_targets_in_every_form_mean_the_same():
    x, labels = data(10, (4,))
    onehot = np.eye(3, dtype="float32")[labels]
    for loss in ("cross_entropy", "squared"):
        protocol = TrainingProtocol(1, 4, checkpoints=(), loss=loss)
        scores = [Training(linear(), protocol, x, t, 0).epoch(1) for t in (labels, labels.astype("uint8"), onehot)]
        assert scores[0].loss == pytest.approx(scores[2].loss, rel=1e-12)
        assert scores[0] == scores[1]


def test_regression_has_no_accuracy():
    x, _ = data(10, (4,))
    protocol = TrainingProtocol(1, 4, checkpoints=(), loss="squared")
    for targets in (x[:, 0], x[:, :1]):
        score = Training(linear(n_outputs=1), protocol, x, targets, 0).epoch(1)
        assert score.accuracy is None
        assert math.isfinite(score.loss)


def test_a_last_batch_of_one_row_joins_the_one_before():
    """BatchNorm over 1×1 images has no variance of one row, and torch refuses it."""
    x, labels = data(17)
    training = Training(resnet(), SHORT, x, labels, 0)
    assert math.isfinite(training.epoch(1).loss)
