"""Post-training quantisation of a really trained network: bias correction makes it better."""

import dataclasses

import torch

import edgemat

from . import recipes


def test_bias_correction_helps_resnet8_at_few_bits(trained):
    network = recipes.NETWORKS["resnet8"]
    split = network.load()
    model = network.model().eval()
    model.load_state_dict(torch.load(trained("resnet8").onnx.parent / "float.pt", weights_only=True))
    batches = [torch.from_numpy(split.x_train[i : i + 64]) for i in range(0, 256, 64)]
    part = dataclasses.replace(split, x_test=split.x_test[:1000], y_test=split.y_test[:1000])
    for weights, activations in ((3, 8), (3, 3)):
        formats = {"weights": f"fixed<{weights}>", "activations": f"fixed<{activations}>"}
        recipe = edgemat.Recipe(**{**network.recipe, **formats})
        scores = [
            recipes.score(
                recipes.outputs(edgemat.ptq(model, batches, recipe, bias_correction=on), part.x_test), part, network
            )
            for on in (False, True)
        ]
        assert scores[1] > scores[0] + 0.01, (weights, activations, scores)
