"""Real text for the examples: the Python standard library's own sources, one byte a token."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

END = 256
"""The token after each document (one source file)."""

VOCAB_SIZE = 257
VALIDATION_SHARE = 20
"""One document in so many is kept for validation."""


def library_documents() -> list[bytes]:
    """The source files of the running Python's standard library, without its tests, by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    paths = sorted(path for path in root.rglob("*.py") if not left_out & set(path.parts))
    return [path.read_bytes() for path in paths if path.stat().st_size]


class Corpus:
    """Documents end to end, cut into sequences of `seq_len` tokens, and shuffled by epoch."""

    def __init__(self, documents: Sequence[bytes], seq_len: int, seed: int) -> None:
        """Raises ValueError if the documents do not fill one sequence."""
        end = torch.tensor([END], dtype=torch.int16)
        parts = [
            part
            for text in documents
            for part in (torch.frombuffer(bytearray(text), dtype=torch.uint8).short(), end)
        ]
        stream = torch.cat([*parts, end.new_empty(0)])
        self.num_sequences = stream.numel() // seq_len
        if not self.num_sequences:
            raise ValueError(
                f"a sequence of {seq_len} tokens needs that much text; there are {stream.numel()}"
            )
        self._sequences = stream[: self.num_sequences * seq_len].view(-1, seq_len)
        self._seed = seed

    def rows(self, first: int, count: int) -> Tensor:
        """`count` sequences from number `first` of the training order, int64 [count, seq_len]."""
        return torch.stack([self._row(number) for number in range(first, first + count)]).long()

    def _row(self, number: int) -> Tensor:
        epoch, place = divmod(number, self.num_sequences)
        order = torch.Generator().manual_seed(self._seed + epoch)
        return self._sequences[torch.randperm(self.num_sequences, generator=order)[place]]


def train_and_validation(seq_len: int, seed: int) -> tuple[Corpus, Corpus]:
    """The library in two parts that share no document."""
    documents = library_documents()
    validation = documents[::VALIDATION_SHARE]
    train = [text for number, text in enumerate(documents) if number % VALIDATION_SHARE]
    return Corpus(train, seq_len, seed), Corpus(validation, seq_len, seed)


def pack(rows: Tensor) -> tuple[Tensor, list[int]]:
    """[B, S] sequences as one of [1, B S], and the cu_seqlens of the documents in it."""
    ends = torch.zeros_like(rows, dtype=torch.bool)
    ends[:, -1] = True
    ends |= rows == END
    return rows.reshape(1, -1), [0, *(ends.flatten().nonzero().flatten() + 1).tolist()]
