"""What stops a change of placement half-way."""


class RebalanceError(RuntimeError):
    """Moving failed. `params` is the tree under the old placement; None where it is lost."""

    def __init__(self, message: str, params):
        super().__init__(message)
        self.params = params
