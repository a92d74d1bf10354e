"""Arguments: refuses those that are out of range."""


def check_at_least(argument: str, value: int, least: int) -> None:
    """Refuse an argument that is too small.

    Raises:
        ValueError: If the value is smaller.

    >>> check_at_least("window", 0, 1)
    Traceback (most recent call last):
    ValueError: window must be at least 1, got 0
    """
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")
