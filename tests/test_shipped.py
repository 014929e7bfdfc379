"""The models that ship with the package."""

import numpy as np

from convnet import bundle


def test_cifar10(shared_data):
    """On 1,000 lossless images of the training set; the test set is in its header."""
    path = bundle.find("cifar10")
    assert path.stat().st_size <= 5_000_000
    model = bundle.load("cifar10")
    assert model.provenance["command"].startswith("python -m convnet.main --config=")
    assert model.classes[3] == "cat"
    assert model.views == "flip_translate"
    assert model.provenance["result"]["test/accuracy"] >= 0.91
    with np.load(shared_data / "convnetjs_cifar10/images_0.npz") as found:
        images, labels = found["images"], found["labels"]
    probabilities = np.asarray(model.predict_fn("float32", "none")(images[:200]))
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert (probabilities.argmax(-1) == labels[:200]).mean() > 0.85
