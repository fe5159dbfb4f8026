"""What stops a run that is balanced while it serves."""


class BalancerError(RuntimeError):
    """Balancing failed; the old placement is in force, and the model can serve on."""


class DigestMismatch(BalancerError):
    """Processes decided differently. Nothing has been moved."""
