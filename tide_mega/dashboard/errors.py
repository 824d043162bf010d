"""What can go wrong with a dashboard."""


class DashboardError(ValueError):
    """A run that cannot be read, or a workspace that cannot be saved; one sentence that says what to do."""
