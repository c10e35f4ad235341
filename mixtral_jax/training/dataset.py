"""Dataset: the examples of all files of a data set, and an account of what became of each row."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.training.example import Example
from mixtral_jax.training.pairs import Pair, read_pair
from mixtral_jax.training.rendering import examples_of, examples_of_pair
from mixtral_jax.training.rows import (
    Chat,
    Completion,
    DataError,
    Refused,
    Row,
    read_content,
    rows_of,
)

Content = Chat | Completion | Pair

_MOST_REASONS = 10  # that an error lists


class BadRows(StrEnum):
    """The treatment of rows that cannot be trained on."""

    REFUSE = "refuse"
    DROP = "drop"


class LongRows(StrEnum):
    """The treatment of examples that are longer than a row of the batch."""

    REFUSE = "refuse"
    TRUNCATE = "truncate"
    DROP = "drop"


class Source(NamedTuple):
    """A file of rows, and how many times each of them comes in an epoch."""

    path: Path
    weight: int = 1

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Returns the source of a text PATH or PATH:WEIGHT. Raises DataError."""
        path, colon, weight = text.rpartition(":")
        if not colon or not weight.replace(".", "").isdigit():
            return cls(Path(text))
        if not weight.isdigit() or int(weight) < 1:
            raise DataError(f"the weight of {path} is {weight}: give a whole number of at least 1")
        return cls(Path(path), int(weight))

    def __str__(self) -> str:
        return f"{self.path}:{self.weight}" if self.weight != 1 else str(self.path)


@dataclass
class Account:
    """Counts of what a data set held and of what became of it."""

    rows: int = 0  # with those that were not kept
    examples: int = 0
    split_chats: int = 0  # chats whose answers have examples of their own
    bad_rows: list[Refused] = field(default_factory=list)  # not trained on
    dropped: int = 0  # examples that were too long
    truncated: int = 0  # examples whose end was cut off
    tokens: int = 0
    targets: int = 0  # tokens that are learnt

    @property
    def target_share(self) -> float:
        """Share of tokens that are learnt."""
        return self.targets / self.tokens if self.tokens else 0.0


class Dataset(NamedTuple):
    """Examples in the order of their rows, those of a source of weight 2 twice; and the account.

    Those of pairs come in twos: that of the preferred answer, and that of the other one.
    """

    examples: Sequence[Example]
    account: Account

    @classmethod
    def read(
        cls,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        length: int,
        *,
        bad_rows: BadRows = BadRows.REFUSE,
        long_rows: LongRows = LongRows.REFUSE,
        ignored_keys: Collection[str] = (),
        has_pairs: bool = False,
    ) -> "Dataset":
        """Returns the data set of some files.

        Args:
            sources: The files.
            tokenizer: That of the model.
            length: Most ids of an example.
            bad_rows: Refuses the data set for a row that cannot be trained on, or drops the row.
            long_rows: Refuses, truncates or drops examples of more ids. One that has no targets
                within `length` is dropped.
            ignored_keys: Keys of rows that mean nothing.
            has_pairs: Rows are pairs of answers, for the objective "preference".

        Raises DataError that names the first rows that are refused, by file and line, and says how
        many there are.
        """
        account = Account()
        reader = _Reader(tokenizer, length, long_rows, account)
        made: list[Example] = []
        for source in sources:
            before = account.rows
            read = read_pair if has_pairs else read_content
            rows: Iterator[Row[Content] | Refused] = rows_of(source.path, read, ignored_keys)
            kept = list(reader.examples(rows))
            if account.rows == before:
                raise DataError(f"{source.path} is empty: it has no rows")
            made += kept * source.weight
        if account.bad_rows and (bad_rows is BadRows.REFUSE or not made):
            raise DataError(_refusal(account.bad_rows, account.rows))
        if not made:
            files = ", ".join(str(source.path) for source in sources)
            raise DataError(
                f"{files} has no row to train on that fits: all {account.rows:,} are longer than "
                f"the length {length:,}; raise length"
            )
        account.examples = len(made)
        account.tokens = sum(len(example.ids) for example in made)
        account.targets = sum(example.num_targets for example in made)
        return cls(made, account)

    def digest(self) -> str:
        """Returns the SHA-256 of all ids and weights in their order, in hexadecimal."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.int64(len(example.ids)).tobytes())
            digest.update(np.ascontiguousarray(example.ids, np.int32).tobytes())
            digest.update(np.ascontiguousarray(example.weights, np.float32).tobytes())
        return digest.hexdigest()


class _Reader:
    """Renders rows, and counts them in an account."""

    def __init__(
        self, tokenizer: Tokenizer, length: int, long_rows: LongRows, account: Account
    ) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._long_rows = long_rows
        self._account = account

    def examples(self, rows: Iterator[Row[Content] | Refused]) -> Iterator[Example]:
        """Yields the examples of rows that are kept."""
        for row in rows:
            self._account.rows += 1
            if isinstance(row, Refused):
                self._account.bad_rows.append(row)
                continue
            try:
                is_pair = isinstance(row.content, Pair)
                yield from self._fitting(self._rendered(row.content), is_pair=is_pair)
            except (ChatError, DataError) as error:
                self._account.bad_rows.append(Refused(row.place, str(error)))

    def _rendered(self, content: Content) -> list[Example]:
        if isinstance(content, Pair):
            return examples_of_pair(content, self._tokenizer)
        examples = examples_of(content, self._tokenizer)
        self._account.split_chats += len(examples) > 1
        return examples

    def _fitting(self, examples: Sequence[Example], *, is_pair: bool) -> list[Example]:
        """Returns the examples of a row that are no longer than the length, or cut to it.

        Of a pair it returns both or none.
        """
        longest = max(len(example.ids) for example in examples)
        if longest > self._length and self._long_rows is LongRows.REFUSE:
            raise DataError(
                f"has {longest:,} tokens, more than the length {self._length:,}: raise length, or "
                "set long_rows to truncate or drop"
            )
        kept, truncated = [], 0
        for example in examples:
            if len(example.ids) <= self._length:
                kept.append(example)
                continue
            cut = Example(example.ids[: self._length], example.weights[: self._length])
            if self._long_rows is LongRows.TRUNCATE and cut.num_targets:
                truncated += 1
                kept.append(cut)
        if is_pair and (len(kept) < len(examples) or np.array_equal(kept[0].ids, kept[1].ids)):
            kept, truncated = [], 0
        self._account.truncated += truncated
        self._account.dropped += len(examples) - len(kept)
        return kept


def _refusal(bad_rows: Sequence[Refused], rows: int) -> str:
    lines = [f"{bad.place} {bad.reason}" for bad in bad_rows[:_MOST_REASONS]]
    if rows == 1:
        return lines[0]
    count = len(bad_rows)
    remedy = "; bad_rows: drop leaves them out" if count < rows else ""
    head = f"{count:,} of {rows:,} rows cannot be trained on{remedy}"
    more = [f"and {count - len(lines):,} more"] if count > len(lines) else []
    return "\n  ".join([f"{head}:", *lines, *more])
