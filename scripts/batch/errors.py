"""What ends a batch before all of its rows are done."""

from __future__ import annotations


class BatchError(Exception):
    """What was asked for cannot be begun; the message says why, and what would help."""


class EndpointError(Exception):
    """The endpoint cannot be reached, or does nothing for us. What was done is kept; another run goes on."""
