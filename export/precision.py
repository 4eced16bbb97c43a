"""What `--dtype` and `--weights` mean: arithmetic and storage. Facts only; knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ExportError, unknown

DTYPES = ("fp32", "fp16", "bf16", "int8")
# weights that each dtype of arithmetic can be combined with, the default first
STORAGE = {
    "fp32": ("fp32", "fp16", "bf16", "int8"),
    "fp16": ("fp16", "int8"),
    "bf16": ("bf16",),
    "int8": ("int8",),
}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Precision:
    """dtype: of the arithmetic; weights: of the storage.

    int8 as dtype: matrix products and convolutions of the U-Net on integers, all else in fp32. int8 as weights: one
    scale for each output channel (row of an embedding), symmetric.
    """

    dtype: str
    weights: str

    @property
    def arithmetic(self) -> str:
        """The floating-point type of what is not integer: fp32, fp16 or bf16."""
        return "fp32" if self.dtype == "int8" else self.dtype

    @property
    def integer(self) -> bool:
        return self.dtype == "int8"


def make_precision(dtype: str, weights: str | None) -> Precision:
    """Raises UsageError for an unknown name, ExportError for a pair that makes no sense."""
    for kind, value in (("dtype", dtype), ("weights", weights or dtype)):
        if value not in DTYPES:
            raise unknown(kind, value, DTYPES)
    if weights and weights not in STORAGE[dtype]:
        raise ExportError(
            f"weights {weights} with dtype {dtype} is not a pair that is exported; with dtype {dtype} weights can be "
            f"{' or '.join(STORAGE[dtype])}"
        )
    return Precision(dtype, weights or dtype)
