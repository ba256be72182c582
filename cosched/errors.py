"""What a user can get wrong, as exceptions that also are the builtin they refine."""

from __future__ import annotations

import msgspec

NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are nothing of the type: of other text, or of brackets without end."""


class CoschedError(Exception):
    """Base of every error a user may cause. The command line prints it as one message."""

    exit_code = 1


class ConfigError(CoschedError, ValueError):
    """A setting is unknown, of the wrong type, or does not fit the others."""

    exit_code = 2


class PluginError(CoschedError, LookupError):
    """A drafter, loss or policy is unknown, registered twice, failed to import, or breaks its role."""

    exit_code = 2


class CheckpointError(CoschedError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the model it is meant for."""

    exit_code = 2


class WorkloadError(CoschedError, ValueError):
    """The prompts or recorded documents cannot be used."""

    exit_code = 2


class RunFolderError(CoschedError, OSError):
    """The run folder exists already, is not writable, or the disk is full."""

    exit_code = 1


class PublicationError(CoschedError, RuntimeError):
    """A publication left other weights than it should have; it was undone."""

    exit_code = 1


class TrainingError(CoschedError, RuntimeError):
    """The trainer cannot be set up or cannot go on."""

    exit_code = 1


class ControlError(CoschedError, RuntimeError):
    """A running server cannot be reached, or refuses what it was asked for."""

    exit_code = 1


class ServerError(CoschedError, OSError):
    """SGLang cannot serve where it was asked to: an address is taken, or is none of this machine."""

    exit_code = 1


class TinyWorldError(CoschedError, RuntimeError):
    """The tiny world cannot be built from what this machine has."""

    exit_code = 1


class RealWorldError(CoschedError, RuntimeError):
    """The public model, its drafts or its prompts cannot be had, or are not what they should be."""

    exit_code = 2
