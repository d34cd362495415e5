"""One way to refuse wrong input: name the argument, the value and what is accepted."""


def check(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError("name=value: expected …") unless `condition` holds.

    Args:
        condition: what must be true.
        name: the argument as the caller wrote it.
        value: what was given.
        expected: the accepted range, in words.
    """
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")
