"""What can go wrong in a fine-tuning job, by who can mend it. Every message says what, expected, got, and the way
out."""


class ConfigError(ValueError):
    """An option has a value that cannot be used (the command line exits with code 2)."""


class DataError(ValueError):
    """The data file cannot be read as text or examples; the message names the line or the byte."""


class ModelError(ValueError):
    """The base model, its tokenizer or the adapter cannot be used for this job."""


class OutputError(RuntimeError):
    """A file of the run could not be written or read back; what was there before is untouched."""


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite. The optimizer step was not taken and nothing was saved."""
