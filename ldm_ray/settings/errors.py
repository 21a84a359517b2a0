"""The errors that a user can cause and mend. Commands print them as one line and exit with 2."""


class LdmError(ValueError):
    """Says what was given, what is allowed, and what to do."""


class ConfigError(LdmError):
    """A flag or a setting."""


class DataError(LdmError):
    """A dataset or an image in it."""


class CheckpointError(LdmError):
    """A checkpoint file."""


class DiskError(LdmError):
    """A disk that takes no more."""


class Foreign(CheckpointError):
    """A file that is no checkpoint, or the checkpoint of something else."""
