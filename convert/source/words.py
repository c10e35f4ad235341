"""Numbers of 4 or 8 bits in words of 32 bits, as integers of weights are published.

A word holds neighbours along inputs or along outputs, the first in its low bits unless a layout
says otherwise. Arrays here are little-endian matrices of words, read from files as they are.

    layout                codes        zeros        scales   for a weight [O I] of 4 bits
    gptq                  [I/8 O]      [G O/8]      [G O]    words along inputs
    awq                   [I O/8]      [G O/8]      [G O]    words along outputs, 0 2 4 6 1 3 5 7
    compressed-tensors    [O I/8]      [O/8 G]      [O G]    words along inputs

G are groups of inputs that share a scale. Words of zeros are along outputs in all three.

Sources: AutoGPTQ's qlinear_cuda_old.py, AutoAWQ's modules/linear/gemm.py, compressed-tensors'
compressors/pack_quantized.
"""

from dataclasses import dataclass

import numpy as np

WORD_BITS = 32


@dataclass(frozen=True)
class Layout:
    """The order in which a weight's integers stand in a file.

    `inputs_first` is true for matrices whose rows are inputs; `codes_along_inputs` for words that
    hold neighbours along inputs. `order` is the field of a word for the first of eight numbers,
    the second and so on; None for ascending fields.
    """

    name: str
    inputs_first: bool
    codes_along_inputs: bool
    order: tuple[int, ...] | None = None

    def codes_shape(self, outputs: int, inputs: int, bits: int) -> tuple[int, int]:
        """The shape of the words of a weight's numbers."""
        if self.codes_along_inputs:
            inputs = words_of(inputs, bits)
        else:
            outputs = words_of(outputs, bits)
        return self._matrix(outputs, inputs)

    def zeros_shape(self, outputs: int, groups: int, bits: int) -> tuple[int, int]:
        """The shape of the words of the groups' zeros."""
        return self._matrix(words_of(outputs, bits), groups)

    def scales_shape(self, outputs: int, groups: int) -> tuple[int, int]:
        """The shape of the groups' scales."""
        return self._matrix(outputs, groups)

    def weight_shape(self, codes: tuple[int, ...], bits: int) -> tuple[int, int]:
        """The shape [O I] of a weight by that of its words."""
        inputs, outputs = codes if self.inputs_first else (codes[1], codes[0])
        numbers = WORD_BITS // bits
        if self.codes_along_inputs:
            return outputs, inputs * numbers
        return outputs * numbers, inputs

    def words_along_outputs(self, begin: int, end: int, bits: int) -> tuple[int, int]:
        """The words along the axis of outputs that hold the outputs from `begin` to `end`."""
        if self.codes_along_inputs:
            return begin, end
        numbers = WORD_BITS // bits
        return begin // numbers, -(-end // numbers)

    def outputs_of_word(self, word: int, bits: int) -> int:
        """The first output that a word along the axis of outputs holds."""
        return word if self.codes_along_inputs else word * (WORD_BITS // bits)

    def codes(self, words: np.ndarray, bits: int) -> np.ndarray:
        """The numbers u8 [O I] in words of codes, for all outputs that the words hold."""
        return self._numbers(words, bits, along_outputs=not self.codes_along_inputs)

    def halves(self, words: np.ndarray) -> np.ndarray:
        """The same of four bits, two numbers in a byte as int4 has them: u8 [O I/2]."""
        if self.codes_along_inputs:  # the bytes are in the words already
            own = words.T if self.inputs_first else words
            return np.ascontiguousarray(own).view(np.uint8)
        by_inputs = self.codes(words, 4).T
        return (by_inputs[0::2] | by_inputs[1::2] << 4).T

    def zeros(self, words: np.ndarray, outputs: int, bits: int) -> np.ndarray:
        """The numbers u8 [O G] in words of zeros."""
        return self._numbers(words, bits, along_outputs=True)[:outputs]

    def _matrix(self, outputs: int, inputs: int) -> tuple[int, int]:
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)

    def _numbers(self, words: np.ndarray, bits: int, *, along_outputs: bool) -> np.ndarray:
        """The numbers [O _] in a matrix of words."""
        fields = _fields(words, bits)
        if self.order is not None:
            fields = fields[..., self.order]
        rows, columns, numbers = fields.shape
        if along_outputs == self.inputs_first:  # neighbours are in the matrix's rows
            matrix = fields.reshape(rows, columns * numbers)
        else:
            matrix = fields.swapaxes(1, 2).reshape(rows * numbers, columns)
        return matrix.T if self.inputs_first else matrix


def words_of(count: int, bits: int) -> int:
    """The number of words that hold so many numbers."""
    return -(-count * bits // WORD_BITS)


def in_each_field(number: int, bits: int) -> int:
    """The word that has a number in all of its fields: 0x11111111 for 1 of four bits."""
    return sum(number << place for place in range(0, WORD_BITS, bits))


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers in each word: [R C] -> u8 [R C 32/bits], those of the low bits first."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, WORD_BITS // 8)
    if bits == 8:
        return octets
    assert bits == 4, bits
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape, WORD_BITS // 4)


GPTQ = Layout("GPTQ", inputs_first=True, codes_along_inputs=True)
# A word's fields hold the outputs 0 2 4 6 1 3 5 7, so output 1 is in field 4.
AWQ = Layout("AWQ", True, codes_along_inputs=False, order=(0, 4, 1, 5, 2, 6, 3, 7))
COMPRESSED_TENSORS = Layout("compressed-tensors", inputs_first=False, codes_along_inputs=True)
