"""The error tree of the library: what a user's input can get wrong.

`UserError` is the root of every error whose message was written for the person who typed the
command or called the library. Each message names the thing that is wrong and the remedy. The
command line prints it in one line; any other exception is a fault of ours and keeps its traceback.

    UserError
      ConfigError      a config that is not understood, or numbers that do not fit together
      TokenizerError   tokenizer files that cannot be read, or that contradict each other
      CheckpointError  files of a checkpoint that are damaged or do not fit its config
      AdapterError     an adapter that cannot be read, or that does not fit its base
      ChatError        a chat or a text that a tokenizer cannot render
      SamplingError    parameters of an answer that have the wrong type or are out of range
      StructureError   a schema or grammar that cannot be enforced
      TopologyError    devices or a mesh that do not exist or do not fit
      (convert adds ConversionError and PullError, planning CompileError, serving its own leaves)
"""


class UserError(ValueError):
    """Something that the caller gave is wrong; the message names it and says what to do."""


class ConfigError(UserError):
    """A model's config that cannot be read, or whose values contradict each other."""


class TokenizerError(UserError):
    """A checkpoint's tokenizer files cannot be read or followed; its weights may still load."""


class CheckpointError(UserError):
    """A checkpoint whose files are damaged, or do not hold the arrays that its config asks for."""


class AdapterError(UserError):
    """An adapter whose files are damaged, ask for what is not supported, or do not fit the base."""


class ChatError(UserError):
    """A chat that cannot be rendered: unknown roles, a template that refuses, text not Unicode.

    Args:
        message: What is wrong, and the remedy.
        path: Way to the field that is wrong, such as ("messages", "2", "tool_call_id"); empty where
            it is none in particular.
    """

    def __init__(self, message: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class SamplingError(UserError):
    """A parameter of an answer that has the wrong type, is out of range or contradicts another."""


class StructureError(UserError):
    """A schema or a grammar that is wrong, too large, or cannot be enforced.

    Args:
        message: What is wrong, and the remedy.
        pointer: JSON pointer (RFC 6901) of the part that is wrong, within the schema; empty for the
            whole.
    """

    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.pointer = pointer


class TopologyError(UserError):
    """Devices, a topology or a mesh that cannot be had, or that the model cannot be split over."""
