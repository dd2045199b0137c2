"""`QuantEmbedding`: rows of a quantised table by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.codes import Codes
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import arguments
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import weight_quantizer, weight_spec
from edgemat.recipe import WeightSpec


class QuantEmbedding(QuantLayer):
    """`torch.nn.Embedding` with a quantised table: indices ``[N]`` or ``[N, T]`` to ``[..., embedding_dim]``.

    The table has one format, with which its rows leave the layer: nothing is computed. In the lowered file the index
    comes in as a number and is checked there: `edgemat.Simulator` refuses what is no row of the table, the C library
    returns ``EM_ERROR_RANGE``. onnxruntime without edgemat takes an index beyond the last row for the last one.

    Attributes:
        weight: The latent table, float32 ``[num_embeddings, embedding_dim]``.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Features of a row.
        format: Format of the table; without ``int_bits`` its binary point is learned.

    Raises:
        FormatError: for sizes below 1, a format with binary points by channel, bipolar, or trits.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, format: str | Fixed | WeightSpec = "fixed<8>"):
        super().__init__()
        num_embeddings = arguments.whole("a QuantEmbedding's num_embeddings", num_embeddings, 1)
        embedding_dim = arguments.whole("a QuantEmbedding's embedding_dim", embedding_dim, 1)
        spec = weight_spec(format, False)
        if spec.ternary is not None or spec.format.bipolar or isinstance(spec.format.int_bits, tuple):
            raise FormatError(
                f"a QuantEmbedding of {spec.ternary or spec.format} was asked for, expected one format for the table "
                "such as 'fixed<8>'"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        plain = WeightSpec(spec.format, "tensor")
        self.weight_quantizer: FixedQuantizer = weight_quantizer(plain, (num_embeddings,), None, 0, "a QuantEmbedding")
        # One bit to spare: an interval narrower than the format says that the input is an index.
        width = num_embeddings.bit_length()
        self.index_format = Fixed(width, width, signed=False)
        self._table_format = ""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `torch.nn.Embedding`."""
        nn.init.normal_(self.weight)

    def indices(self, x: Tensor) -> Tensor:
        """`x` as int64 indices.

        Raises:
            FormatError: for anything that is no row of the table.
        """
        index = x if x.dtype in (torch.int64, torch.int32) else x.to(torch.int64)
        if index.numel():
            low, high = (int(v) for v in torch.aminmax(index))
            if low < 0 or high >= self.num_embeddings or (index is not x and not torch.equal(index.to(x.dtype), x)):
                raise FormatError(
                    f"layer {self.path or type(self).__name__!r} got indices from {x.min()} to {x.max()}, expected "
                    f"whole numbers from 0 to {self.num_embeddings - 1}"
                )
        return index

    def forward(self, x: Tensor) -> Tensor:
        """Looks up rows; `x` holds indices, integers or whole floats."""
        if exporting():
            self.check_frozen()
            limit = self.num_embeddings - 1
            index = emit("Quantize", (x,), x.shape, y_format=str(self.index_format), limit=limit)
            shape = [*x.shape, self.embedding_dim]
            return emit("Embedding", (index, self.table_codes), shape, y_format=self._table_format)
        if not self.weight_quantizer.ready and self.training:
            self.weight_quantizer.fit(self.weight)
        return self.weight_quantizer(nn.functional.embedding(self.indices(x), self.weight))

    def result_quantizer(self) -> FixedQuantizer | None:
        """The quantiser of the table, whose rows leave as they are."""
        return self.weight_quantizer

    @property
    def output(self) -> FixedQuantizer:
        """The quantiser whose values leave the layer: what a following layer is linked to."""
        return self.weight_quantizer

    @torch.no_grad()
    def freeze(self) -> None:
        """Stores the codes of the table and the text of its format."""
        super().freeze()
        self.weight_quantizer._check_ready()
        self._table_format = str(self.weight_quantizer.format)
        if self.defers:
            self.defer("table_codes", self._rows())
            return
        codes = self.weight_quantizer.codes(self.weight_quantizer(self.weight))
        self.register_buffer("table_codes", codes.to(torch.int32))

    def _rows(self) -> Codes:
        """The codes of the table, made block by block."""

        @torch.no_grad()
        def read(first: int, last: int) -> np.ndarray:
            made: np.ndarray = self.weight_quantizer.codes(self.weight_quantizer(self.weight[first:last])).cpu().numpy()
            return made

        return Codes((self.num_embeddings, self.embedding_dim), np.dtype(np.int64), read)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def embedding_like(old: Any, format: str | Fixed | WeightSpec) -> QuantEmbedding:
    """The quantised twin of a `torch.nn.Embedding`, which shares its table.

    Raises:
        FormatError: for a table whose rows are normalised at look-up.
    """
    if old.max_norm is not None:
        raise FormatError(f"an Embedding with max_norm={old.max_norm} was given, expected None: rows are stored as is")
    layer = QuantEmbedding(old.num_embeddings, old.embedding_dim, format)
    layer.weight = old.weight
    return layer
