"""What export says when it cannot do what was asked: one sentence for the person who can act on it."""


class ExportError(Exception):
    """Export stopped; the message says what happened, to which model, and what to do next."""


class UnsupportedModel(ExportError):
    """The model cannot be carried by the step contract; the message names what is missing."""
