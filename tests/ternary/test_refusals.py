"""What cannot be meant is refused in one sentence that names what was found and what was expected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import GLU, MLGRU, MatMulFreeLM, QuantEmbedding, TernaryConv1d, TernaryConv2d, TernaryLinear

PROMPT = torch.tensor([[1, 2]])


@pytest.fixture(scope="module")
def model() -> MatMulFreeLM:
    torch.manual_seed(0)
    made = MatMulFreeLM(5, 8, 1, hidden=8)
    edgemat.calibrate(made, [torch.tensor([[0, 1, 2], [3, 4, 0]])])
    return made.eval()


@pytest.mark.parametrize(
    ("count", "temperature", "words"),
    [
        (-2, 0.0, "count is -2, expected a whole number of at least 0"),
        (2.5, 0.0, "count is 2.5, expected a whole number"),
        (True, 0.0, "count is True"),
        ("3", 0.0, "count is '3'"),
        (3, -1.0, "temperature is -1.0, expected a finite number of at least 0"),
        (3, math.nan, "temperature is nan"),
        (3, math.inf, "temperature is inf"),
        (3, "1", "temperature is '1'"),
    ],
)
def test_generate_refuses_counts_and_temperatures(
    model: MatMulFreeLM, count: Any, temperature: Any, words: str
) -> None:
    with pytest.raises(FormatError, match=f"^generate: {words}"):
        model.generate(PROMPT, count, temperature)


def test_generate_takes_what_is_at_the_edge(model: MatMulFreeLM) -> None:
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)
    coldest = model.generate(PROMPT, np.int64(4), 1e-320)  # type: ignore[arg-type]
    assert torch.equal(coldest, model.generate(PROMPT, 4))
    assert torch.equal(model.generate(PROMPT.float(), 4), coldest)


WRONG_TOKENS = [
    (torch.zeros(1, 0, dtype=torch.int64), r"got tokens of shape \(1, 0\), expected \[N, T\] with at least one token"),
    (torch.tensor(1), r"got tokens of shape \(\), expected \[N, T\]"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), r"got tokens of shape \(1, 2, 3\), expected \[N, T\]"),
    (PROMPT.bool(), "got tokens of type torch.bool, expected integers"),
    (PROMPT.to(torch.complex64), "got tokens of type torch.complex64, expected integers"),
    ([[1, 2]], "got a list, expected a tensor of tokens"),
    (torch.tensor([[5]]), "got indices from 5 to 5, expected whole numbers from 0 to 4"),
    (torch.tensor([[-1, 2]]), "got indices from -1 to 2, expected whole numbers from 0 to 4"),
    (torch.tensor([[0.5]]), "got indices from 0.5 to 0.5, expected whole numbers"),
    (torch.tensor([[math.nan]]), "got indices from nan to nan, expected whole numbers"),
]


@pytest.mark.parametrize(("tokens", "words"), WRONG_TOKENS)
def test_tokens_that_are_none_are_refused(model: MatMulFreeLM, tokens: Any, words: str) -> None:
    for call in (model.prefill, lambda given: model.generate(given, 1)):
        with pytest.raises(FormatError, match=words):
            call(tokens)
    if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1]:
        with pytest.raises(FormatError, match=words):
            model.reset()
            model.step(tokens[:, 0] if tokens.shape[1] == 1 else tokens[0])


def test_a_step_takes_one_token_of_each_sequence(model: MatMulFreeLM) -> None:
    for wrong in (PROMPT, torch.tensor(1)):
        with pytest.raises(FormatError, match=r"^step got tokens of shape .*, expected \[N\]$"):
            model.step(wrong)
    with pytest.raises(FormatError, match=r"^MatMulFreeLM got tokens .* expected \[N\] or \[N, T\]"):
        model(PROMPT[None])


def test_what_comes_before_calibration_or_in_training_is_refused(tmp_path: Path) -> None:
    fresh, token = MatMulFreeLM(5, 8, 1, hidden=8).eval(), torch.tensor([1])
    calls = (
        lambda: fresh.step(token),
        lambda: fresh.prefill(PROMPT),
        lambda: fresh.generate(PROMPT, 1),
        lambda: edgemat.to_onnx(fresh, (token,), tmp_path / "lm.onnx"),
    )
    for call in calls:
        with pytest.raises(FormatError, match=r"has no binary point yet.* call edgemat\.calibrate"):
            call()
    with pytest.raises(FormatError, match=r"in training mode.* call eval\(\)"):
        fresh.train().step(token)
    with pytest.raises(FormatError, match=r"^generate was called in training mode.* call model\.eval\(\)"):
        fresh.generate(PROMPT, 1)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "4", True, None])
def test_sizes_below_one_and_no_numbers_are_refused(wrong: Any) -> None:
    def words(what: str) -> str:
        return f"{what} is {wrong!r}, expected a whole number of at least 1"

    for name in ("vocabulary", "dim", "layers"):
        with pytest.raises(FormatError, match=words(f"a MatMulFreeLM's {name}")):
            MatMulFreeLM(**{"vocabulary": 4, "dim": 4, "layers": 1, name: wrong})
    with pytest.raises(FormatError, match=words("a TernaryLinear's in_features")):
        TernaryLinear(wrong, 3)
    with pytest.raises(FormatError, match=words("a TernaryLinear's out_features")):
        TernaryLinear(3, wrong)
    for layer in (TernaryConv1d, TernaryConv2d):
        for place, name in enumerate(("in_channels", "out_channels", "kernel_size")):
            shape = [3, 4, 2]
            shape[place] = wrong
            with pytest.raises(FormatError, match=words(f"a {layer.__name__}'s {name}")):
                layer(*shape)
    with pytest.raises(FormatError, match=words("a TernaryConv2d's kernel_size")):
        TernaryConv2d(3, 4, (2, wrong))
    with pytest.raises(FormatError, match=words("a QuantEmbedding's num_embeddings")):
        QuantEmbedding(wrong, 3)
    with pytest.raises(FormatError, match=words("a QuantEmbedding's embedding_dim")):
        QuantEmbedding(3, wrong)


def test_mixers_refuse_features_of_another_shape() -> None:
    with pytest.raises(FormatError, match=r"layer 'GLU' got features of shape \(2, 5\), expected \[\.\.\., 4\]"):
        GLU(4, 8)(torch.zeros(2, 5))
    for wrong in (torch.zeros(1, 1, 4), torch.zeros(1, 5), torch.zeros(4)):
        with pytest.raises(FormatError, match=r"expected \[N, T, 4\] with at least one token, or \[N, 4\]"):
            MLGRU(4).step(wrong)
