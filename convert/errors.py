"""The errors of this package: ConversionError, with all that is wrong at once, and PullError."""

from collections.abc import Sequence

from mixtral_jax.errors import UserError

_SHOWN = 10


class ConversionError(UserError):
    """A source that cannot be converted, or a checkpoint that cannot be exported.

    `problems` holds one sentence per fault, each naming the file, tensor or field and, where there
    is one, the remedy. The message shows the first ten.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[:_SHOWN])
        if len(self.problems) > _SHOWN:
            shown.append(f"and {len(self.problems) - _SHOWN} more")
        super().__init__("\n".join(shown))


class PullError(UserError):
    """Weights that could not be fetched; the message says what to do about it."""
