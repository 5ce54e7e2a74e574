"""What attention costs in multiplications, additions and energy, head by head, as the paper counts."""

from __future__ import annotations

from dataclasses import dataclass

_MULTIPLICATION, _ADDITION = 3.7, 0.9  # picojoules, float32 in 45 nm


@dataclass(frozen=True)
class Work:
    """multiplications and additions of one head for one sequence; products with ±1 are additions."""

    multiplications: int
    additions: int

    @property
    def picojoules(self) -> float:
        """The energy of the arithmetic; what moving the numbers takes is not counted."""
        return _MULTIPLICATION * self.multiplications + _ADDITION * self.additions


def softmax_work(length: int, head_size: int) -> Work:
    """Of softmax attention: scores, their scale, and their mean of the values."""
    products = 2 * length**2 * head_size
    return Work(products + length**2, products)


def ecoformer_work(length: int, head_size: int, anchors: int, bits: int) -> Work:
    """Of codes and what is read through them: kernel, hash, context, read-out and normaliser."""
    hashing = length * anchors * bits
    return Work(
        2 * length * anchors + hashing + length + length * head_size,
        2 * length * anchors * head_size + hashing + 2 * length * bits * head_size + length * head_size + length * bits,
    )
